--- What an app would do with a message: pure, no broker.
--
-- Where a message published to an exchange goes is found by the bindings of the script; what other programs have bound
-- is not known here.
-- @module moonrabbit.life.explain

local Trie = require "moonrabbit.app.route.trie"
local broker = require "moonrabbit.testing.broker"
local clock = require "moonrabbit.testing.clock"
local failure = require "moonrabbit.app.failure"
local protect = require "moonrabbit.protect"
local topology = require "moonrabbit.app.topology"

local explain = {}

-- ---- The broker's routing ---------------------------------------------------------------------------

local function topic_matches(pattern, key)
  local trie = Trie.new()
  trie:add(pattern, 1)
  return trie:first(key, 0) == 1
end

local function headers_match(arguments, headers)
  local any, some = arguments["x-match"] == "any" or arguments["x-match"] == "any-with-x", false
  for name, wanted in pairs(arguments) do
    if not tostring(name):find "^x%-" then
      local holds = headers[name] == wanted
      if holds and any then return true end
      if not holds and not any then return false end
      some = true
    end
  end
  return not any or not some
end

local matchers = {
  fanout = function() return true end,
  direct = function(bind, message) return (bind[2] or "") == message.routing_key end,
  topic = function(bind, message) return topic_matches(bind[2] or "", message.routing_key) end,
  headers = function(bind, message) return headers_match(bind.arguments or {}, message.headers) end,
}

local builtin = { ["amq.direct"] = "direct", ["amq.fanout"] = "fanout", ["amq.topic"] = "topic",
  ["amq.headers"] = "headers", ["amq.match"] = "headers" }

local function kind_of(plan, exchange)
  local spec = plan.exchanges[exchange]
  return builtin[exchange] or spec and (spec.type or "topic")
end

local reach

-- Whether anything was bound that takes it.
local function follow(plan, exchange, message, found, seen)
  local matches = matchers[kind_of(plan, exchange) or ""]
  if not matches then
    found.unknown[exchange] = true
    return true
  end
  local taken = false
  for name, queue in pairs(plan.queues) do
    for _, bind in ipairs(queue.bind or {}) do
      if bind[1] == exchange and matches(bind, message) then
        found.queues[name], taken = true, true
      end
    end
  end
  for name, other in pairs(plan.exchanges) do
    for _, bind in ipairs(other.bind or {}) do
      if bind[1] == exchange and matches(bind, message) then
        taken = true
        reach(plan, name, message, found, seen)
      end
    end
  end
  return taken
end

function reach(plan, exchange, message, found, seen)
  if seen[exchange] then return end
  seen[exchange] = true
  local spec = plan.exchanges[exchange]
  if not follow(plan, exchange, message, found, seen) and spec and spec.alternate then
    reach(plan, spec.alternate, message, found, seen)
  end
end

--- The queues that a message published to an exchange reaches, as a set; and the exchanges whose kind the client
--- cannot follow (a plugin's).
---@param plan table
---@param exchange string "": the key is the queue
---@param message table
---@return table<string, true> queues, table<string, true> unknown
function explain.queues(plan, exchange, message)
  local found = { queues = {}, unknown = {} }
  if exchange == "" then
    if plan.queues[message.routing_key] then found.queues[message.routing_key] = true end
  else
    reach(plan, exchange, message, found, {})
  end
  return found.queues, found.unknown
end

-- ---- Routes -----------------------------------------------------------------------------------------

local function describe(consumer, target)
  local text = target ~= nil and consumer.target.describe[target]
  if text then return text end
  if target == nil or type(target) == "table" and next(target) == nil then
    return "no rule takes it: a permanent failure, so a dead letter"
  end
  if type(target) == "table" and #target > 0 then
    local parts = {}
    for i = 1, #target do parts[i] = describe(consumer, target[i]) end
    return table.concat(parts, ", then ")
  end
  return type(target) == "function" and "a handler" or tostring(target)
end

-- Every canary on the way gives this version.
local function resolve(consumer, message, version)
  local canaries = consumer.target.canaries
  for _, canary in ipairs(canaries) do canary.choose = function() return version end end
  local job = {}
  local ok, target = protect(consumer.target.resolve, message, job)
  for _, canary in ipairs(canaries) do canary.choose = nil end
  if not ok then return "a condition threw: " .. failure.text(target) end
  return describe(consumer, target), job.trials and job.trials[1]
end

--- What takes a message in a consumer: a list of { text, share of the messages in percent }, of two where a canary is
--- on the way.
---@param consumer table compiled
---@param message table
---@return { text: string, percent: number }[]
function explain.route(consumer, message)
  local stable, canary = resolve(consumer, message, "stable")
  if not canary then return { { text = stable, percent = 100 } } end
  return {
    { text = stable, percent = 100 - canary.weight },
    { text = (resolve(consumer, message, "candidate")), percent = canary.weight },
  }
end

-- ---- Retries ----------------------------------------------------------------------------------------

--- What becomes of a message whose handler fails each time: lines for people.
---@param app moonrabbit.App
---@param consumer table compiled
---@return string[]
function explain.retries(app, consumer)
  local policy, lines = consumer.retry, {}
  local dead = consumer.dead_letter == false and "it is rejected: the queue's own dead-letter exchange, or dropped"
    or ("it goes to the dead letters: '%s'"):format(consumer.dead_letter or app.name .. ".dead")
  if policy == nil then return { "a failure is not retried: " .. dead } end
  local where = (consumer.in_process == true or consumer.order_by) and "; the waiting is in the process" or ""
  if type(policy) ~= "table" or not policy.timetable then
    return { "a function of yours decides about retries" .. where, "nil: " .. dead }
  end
  lines[1] = policy:describe() .. where
  for _, time in ipairs(policy:timetable(10)) do
    local delay = ("%.3g to %.3g s"):format(time.least, time.most)
    if time.least == time.most then delay = ("%g s"):format(time.most) end
    lines[#lines + 1] = ("attempt %d fails: again in %s (%g s after the first failure)"):format(time.attempt, delay,
      time.after)
  end
  lines[#lines + 1] = "then " .. dead
  return lines
end

-- ---- Topology ---------------------------------------------------------------------------------------

local function arguments_text(arguments)
  local parts = {}
  for name, value in pairs(arguments or {}) do parts[#parts + 1] = name .. "=" .. tostring(value) end
  table.sort(parts)
  return #parts > 0 and " " .. table.concat(parts, " ") or ""
end

--- A step of moonrabbit.app.topology in a line.
---@param step table
---@return string
function explain.step(step)
  local kind, name, third, key, opts = step[1], step[2], step[3], step[4], step[5]
  if kind == "bind_queue" or kind == "bind_exchange" then
    return ("%s %s <- %s %s%s"):format(kind == "bind_queue" and "binding " or "binding (exchange) ", name, third,
      key == "" and "''" or key, arguments_text(opts and opts.arguments))
  end
  local words = { kind == "queue" and "queue   " or "exchange", name }
  if third.type then words[#words + 1] = third.type end
  if third.passive then words[#words + 1] = "(only verified)" end
  if third.durable == false then words[#words + 1] = "transient" end
  if third.exclusive then words[#words + 1] = "exclusive" end
  if third.auto_delete then words[#words + 1] = "auto-delete" end
  return table.concat(words, " ") .. arguments_text(third.arguments)
end

-- A delay for each step of the ladder that a policy may use: with jitter, all from the shortest to the longest.
local function delays_of(policy, made, delays)
  if type(policy) ~= "table" then return end
  for _, case in ipairs(policy.cases and policy:cases() or {}) do delays_of(case[2], made, delays) end
  for _, time in ipairs(policy.timetable and policy:timetable(100) or {}) do
    local delay = time.least
    repeat
      local step = made.ladder:step(delay)
      if step and delay > made.threshold then delays[#delays + 1] = delay end
      delay = step and (step + 1) / 1000 or math.huge
    until delay > time.most
    if time.most > made.threshold then delays[#delays + 1] = time.most end
  end
end

-- The ladder of a consumer, as its disposal would make it.
local function ladder_steps(app, consumer, add, version)
  local made = require("moonrabbit.app.disposal").new {
    app = app.name, consumer = consumer, publisher = function() end,
  }
  local delays = {}
  for i, seconds in ipairs(made.ladder.steps or {}) do delays[i] = seconds end
  delays_of(consumer.retry, made, delays)
  if made.threshold < math.huge then
    local all, more = made.ladder:entities({ consumer.queue }, delays, version),
      { existing = made.ladder.mode == "existing" }
    for _, x in ipairs(all.exchanges) do
      add(more, "exchange", x.name, { type = x.type, durable = x.durable, arguments = x.arguments })
    end
    for _, q in ipairs(all.queues) do
      local as_is = { existing = more.existing, as_is = q.name == made.ladder.orphans }
      add(as_is, "queue", q.name, { durable = q.durable, arguments = q.arguments })
    end
    for _, b in ipairs(all.bindings) do add(more, "bind_queue", b.queue, b.exchange, b.routing_key) end
  end
  if made.parking then
    local q = require("moonrabbit.app.dead_letter").entity(made.parking, version)
    add({ as_is = true }, "queue", q.name, { durable = true, arguments = q.arguments })
  end
end

local order = { exchange = 1, queue = 2, bind_exchange = 3, bind_queue = 4 }

--- Everything that the app declares, ladder and dead-letter queues included, as far as its policies tell their delays.
---@param app moonrabbit.App
---@param version string? the broker's; a new one by default
---@return table[] steps of moonrabbit.app.topology. Those of ladders and dead letters have ladder = true; existing = true
--- where the app only looks whether it is there, as_is = true where it takes what is there with other properties
function explain.topology(app, version)
  local steps, seen = topology.steps(app.plan), {}
  for _, step in ipairs(steps) do seen[table.concat({ step[1], step[2] }, "\0")] = step[1]:find "^bind" == nil end
  local function add(more, kind, name, third, key)
    local id = kind:find "^bind" and table.concat({ kind, name, third, key }, "\0") or kind .. "\0" .. name
    if seen[id] then return end
    seen[id] = true
    steps[#steps + 1] = { kind, name, third, key, ladder = true, existing = more.existing, as_is = more.as_is }
  end
  for _, consumer in ipairs(app.plan.consumers) do ladder_steps(app, consumer, add, version) end
  local at = {}
  for i, step in ipairs(steps) do at[step] = i end
  table.sort(steps, function(a, b)
    if order[a[1]] ~= order[b[1]] then return order[a[1]] < order[b[1]] end
    return at[a] < at[b]
  end)
  return steps
end

--- A message to ask about.
---@param body string
---@param fields table exchange, routing_key, headers, properties
---@return moonrabbit.testing.Message
function explain.message(body, fields)
  return broker.message({ channel = broker.channel(clock.new()) }, body, fields)
end

return explain
