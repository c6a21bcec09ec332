--- What a user must be allowed to do for an app, and whether it is; nothing is changed to find that out.
--
-- The broker looks at permissions first. So each right is tried by what it refuses for another reason afterwards: a
-- queue with a time to live that is none, a consumer with such a priority, a message with such an expiration. 403: the
-- right is missing; 406 or 404: it is there.
-- @module moonrabbit.life.rights

local rights = {}

---@alias moonrabbit.life.Right { right: "configure"|"write"|"read", kind: "exchange"|"queue", name: string }

local NONSENSE = "moonrabbit doctor"

-- ---- What is needed ---------------------------------------------------------------------------------

-- What a declaration of something new needs for the exchanges that it names.
local function of_arguments(need, kind, name, arguments)
  local other = arguments["x-dead-letter-exchange"] or arguments["alternate-exchange"]
  if type(other) ~= "string" then return end
  need("read", kind, name)
  need("write", "exchange", other)
end

local function of_entity(need, difference)
  local step, missing = difference.step, difference.state == "missing"
  local kind, name, opts = step[1], step[2], step[3]
  if opts.passive or step.existing or step.as_is and not missing then return end
  need("configure", kind, name)
  if missing then of_arguments(need, kind, name, opts.arguments or {}) end
end

local function of_binding(need, step)
  if step.existing then return end
  need("write", step[1] == "bind_queue" and "queue" or "exchange", step[2])
  need("read", "exchange", step[3])
end

local function of_consumer(need, app, consumer)
  need("read", "queue", consumer.queue)
  if consumer.dead_letter ~= false then need("write", "exchange", "") end
  for _, send in ipairs(consumer.target.sends) do
    local exchange = send.exchange or ""
    if type(exchange) == "string" and (exchange == "" or app.plan.exchanges[exchange]) then
      need("write", "exchange", exchange)
    end
  end
end

--- What an app needs, as far as its script tells.
---@param app moonrabbit.App
---@param differences moonrabbit.life.Difference[]  of everything that it declares
---@return moonrabbit.life.Right[]
function rights.needed(app, differences)
  local list, known = {}, {}
  local function need(right, kind, name)
    local id = right .. "\0" .. kind .. "\0" .. name
    if known[id] then return end
    known[id] = true
    list[#list + 1] = { right = right, kind = kind, name = name }
  end
  for _, each in ipairs(differences) do
    local step = each.step
    if step[1] == "exchange" or step[1] == "queue" then of_entity(need, each) else of_binding(need, step) end
    if step.ladder and step[1] == "exchange" and step[2]:find(".wait.", 1, true) then
      need("write", "exchange", step[2]) -- retries are published there
    end
  end
  for _, consumer in ipairs(app.plan.consumers) do of_consumer(need, app, consumer) end
  return list
end

-- ---- What is missing --------------------------------------------------------------------------------

local tries = { configure = {} }

function tries.configure.queue(channel, name)
  return channel:queue_declare(name, { arguments = { ["x-message-ttl"] = NONSENSE } })
end

function tries.configure.exchange(channel, name)
  return channel:exchange_declare(name, { arguments = { ["alternate-exchange"] = 1 } })
end

-- For these two the broker asks about the name alone.
function tries.read(channel, name) return channel:consume(name, { arguments = { ["x-priority"] = NONSENSE } }) end

function tries.write(channel, name)
  return channel:publish("", { exchange = name, routing_key = NONSENSE, expiration = NONSENSE })
end

local function try(connection, right)
  local channel, err = connection:channel { confirm = right.right == "write" }
  if not channel then return nil, err end
  local way = tries[right.right]
  if type(way) == "table" then way = way[right.kind] end
  local ok
  ok, err = way(channel, right.name)
  channel:close()
  if ok or err.code == 406 or err.code == 404 then return true end
  if err.code == 403 then return false end
  return nil, err
end

--- Which of them the user lacks; nil, err when the broker cannot be asked.
---@param connection moonrabbit.Connection
---@param list moonrabbit.life.Right[]
---@return moonrabbit.life.Right[]|nil, moonrabbit.Error?
function rights.missing(connection, list)
  local found = {}
  for _, each in ipairs(list) do
    local allowed, err = try(connection, each)
    if allowed == nil then return nil, err end
    if not allowed then found[#found + 1] = each end
  end
  return found
end

return rights
