--- What is wrong with a ladder, as far as the management API tells.
--
-- | problem | |
-- | --- | --- |
-- | `stuck` | messages whose wait is over cannot go home: the consumer's queue is full |
-- | `policy` | a policy of the broker changes a wait queue: a shorter TTL ends waits early, a length limit refuses retries |
-- | `classic` | a wait queue dead-letters at most once |
-- | `orphans` | messages whose consumer queue was deleted |
-- | `delivery_limit` | a consumer's quorum queue gives a message up after fewer than 10 returns |
-- | `kind` | a consumer's queue is a stream or exclusive at the broker, which no copy can come home to, and the script does not say so |
-- @module moonrabbit.app.ladder_check

local ladder_check = {}

-- Of a policy: what changes how a wait queue works.
local harmful = {
  "message-ttl", "expires", "max-length", "max-length-bytes", "overflow", "dead-letter-exchange",
  "dead-letter-routing-key", "dead-letter-strategy", "delivery-limit",
}

local LEAST_DELIVERY_LIMIT = 10

---@class moonrabbit.LadderProblem
---@field queue string
---@field problem "stuck"|"policy"|"classic"|"orphans"|"delivery_limit"|"kind"
---@field text string       for people
---@field messages integer? how many it is about

local function add(list, queue, problem, messages, text, ...)
  list[#list + 1] = { queue = queue.name, problem = problem, messages = messages, text = text:format(...) }
end

local function check_policy(list, queue)
  local definition = queue.effective_policy_definition
  if type(definition) ~= "table" then return end
  local found = {}
  for _, name in ipairs(harmful) do
    if definition[name] ~= nil then found[#found + 1] = name end
  end
  if #found == 0 then return end
  add(list, queue, "policy", nil, "the wait queue '%s' is under the policy '%s' (%s): leave the ladder's queues out",
    queue.name, tostring(queue.policy or queue.operator_policy), table.concat(found, ", "))
end

local function check_wait_queue(list, queue)
  local stuck = tonumber(queue.messages_dlx) or 0
  if stuck > 0 then
    add(list, queue, "stuck", stuck, "%d messages in '%s' cannot go home: is a consumer's queue full?", stuck,
      queue.name)
  end
  if queue.type == "classic" then
    add(list, queue, "classic", nil, "the wait queue '%s' is a classic queue, which dead-letters at most once",
      queue.name)
  end
  check_policy(list, queue)
end

local function check_orphans(list, queue)
  local count = tonumber(queue.messages) or 0
  if count == 0 then return end
  add(list, queue, "orphans", count, "%d messages in '%s' have no consumer queue any more: moonrabbit dlq replay %s",
    count, queue.name, queue.name)
end

local function delivery_limit(queue)
  local arguments, definition = queue.arguments, queue.effective_policy_definition
  local limits = {
    type(arguments) == "table" and tonumber(arguments["x-delivery-limit"]) or math.huge,
    type(definition) == "table" and tonumber(definition["delivery-limit"]) or math.huge,
  }
  return math.min(limits[1], limits[2])
end

local function check_kind(list, queue)
  if queue.type == "stream" then
    add(list, queue, "kind", nil, "the queue '%s' is a stream, where a retry would come back to every reader: say "
      .. "type = \"stream\" in the script, and its retries stay in the process", queue.name)
  elseif queue.exclusive == true then
    add(list, queue, "kind", nil, "the queue '%s' is exclusive, and gone before a retry comes back: say "
      .. "exclusive = true in the script, and its retries stay in the process", queue.name)
  end
end

local function check_consumer_queue(list, queue)
  check_kind(list, queue)
  local limit = delivery_limit(queue)
  if limit < 0 or limit >= LEAST_DELIVERY_LIMIT then return end
  add(list, queue, "delivery_limit", nil, "the queue '%s' gives a message up after %d returns: a lost connection and "
    .. "a stop are returns too, allow 10 at least", queue.name, limit)
end

--- Looks at queues as Management:queues lists them.
---@param ladder moonrabbit.Ladder
---@param queues table[]
---@param consumed string[]? the queues that the ladder brings messages home to
---@return moonrabbit.LadderProblem[] problems none: an empty list
function ladder_check.run(ladder, queues, consumed)
  local list, is_consumed = {}, {}
  for _, name in ipairs(consumed or {}) do is_consumed[name] = true end
  local prefix = ladder.name .. ".wait."
  for _, queue in ipairs(queues) do
    if queue.name:sub(1, #prefix) == prefix then check_wait_queue(list, queue) end
    if queue.name == ladder.orphans then check_orphans(list, queue) end
    if is_consumed[queue.name] then check_consumer_queue(list, queue) end
  end
  return list
end

return ladder_check
