--- Checks what `mr.app` was given, all of it, before anything is connected or declared; and fills in what was
-- left out. A mistake throws with the line of the script, what was wrong, and what was expected.
-- @module moonrabbit.app.plan

local connection_options = require "moonrabbit.connection.options"
local consumers = require "moonrabbit.app.plan.consumers"
local cycles = require "moonrabbit.app.cycles"
local entities = require "moonrabbit.app.plan.entities"
local fields = require "moonrabbit.app.plan.fields"
local mistake = require "moonrabbit.app.plan.mistake"
local partitions = require "moonrabbit.app.flow.partitions"

local bad, check = mistake.bad, mistake.check

local plan = {}

local function check_connect(given)
  if type(given) ~= "table" or given.consume or given.publish then return end
  local ok, problem = pcall(connection_options.check, given, -2)
  if not ok then bad("connect: %s", (problem:gsub("^connect: ", ""))) end
end

local function kind_of(queue)
  return queue.type or queue.arguments and queue.arguments["x-queue-type"] or "classic"
end

-- A copy would come back to every reader of a stream, and might find an exclusive queue gone.
local function keep_in_process(compiled)
  local stream = compiled.kind == "stream"
  if stream or compiled.exclusive then compiled.in_process = true end
  if stream then compiled.hold = compiled.hold or math.huge end -- nothing goes back to a stream
end

local function compile_consumer(what, spec, given)
  consumers.check(what, spec, given)
  local queue = spec.queues[given.queue]
  local compiled = {}
  for key, value in pairs(given) do compiled[key] = value end
  compiled.app, compiled.trace = spec.name, spec.trace ~= false
  compiled.kind = kind_of(queue)
  compiled.exclusive = queue.exclusive or false
  keep_in_process(compiled)
  compiled.concurrency = given.concurrency or consumers.joins(given) and 1 or 16
  compiled.prefetch = given.prefetch
    or math.min(65535, math.max(64, 4 * compiled.concurrency, given.batch and 2 * given.batch.size or 0))
  if compiled.ladder == nil then compiled.ladder = spec.ladder end
  compiled.target = consumers.check_route(what, spec, given)
  compiled.handler_at = compiled.target.constant and compiled.target.describe[compiled.target.constant]
  if type(given.partitions) == "number" then compiled.partitions = { count = given.partitions } end
  return compiled
end

local function check_cycles(spec)
  local queues = cycles.find(spec)
  if queues then
    bad("consumers: a cycle: everything goes round by way of the queues '%s'", table.concat(queues, "', '"))
  end
end

-- One of our own (of metrics) hears more.
local function check_observer(observer)
  if observer and not observer.guarded then check("observer", observer, fields.observer) end
end

-- Partitions are in the place of their queue.
local function check_partitions(compiled)
  local by = {}
  for i, consumer in ipairs(compiled) do
    if consumer.partitions then by[consumer.queue] = by[consumer.queue] or i end
  end
  for i, consumer in ipairs(compiled) do
    local other = by[consumer.queue]
    if other and other ~= i then
      bad("consumers[%d]: the queue '%s' is not there: consumers[%d] has put partitions in its place", i,
        consumer.queue, other)
    end
  end
end

local function copy(map)
  local all = {}
  for key, value in pairs(map or {}) do all[key] = value end
  return all
end

local function compile_all(spec)
  check("the app", spec, fields.app)
  if spec.name == nil or spec.name == "" then bad("the name is missing: name = \"orders\"") end
  consumers.check_ladder("the app", spec.ladder, spec.name)
  check_connect(spec.connect)
  check_observer(spec.observer)
  entities.check_exchanges(spec)
  entities.check_queues(spec)
  local given = spec.consumers
  if type(given) ~= "table" or next(given) == nil then
    bad("there are no consumers: consumers = { { queue = …, handler = … } }")
  end
  local count = 0
  for _ in pairs(given) do count = count + 1 end
  local compiled = {}
  for i = 1, count do
    if given[i] == nil then bad("consumers must be a list, and entry %d is missing", i) end
    compiled[i] = compile_consumer(("consumers[%d]"):format(i), spec, given[i])
  end
  check_partitions(compiled)
  check_cycles(spec)
  local made = {
    name = spec.name, exchanges = copy(spec.exchanges), queues = copy(spec.queues), consumers = {},
    ladder = spec.ladder, trace = spec.trace ~= false,
  }
  for _, consumer in ipairs(compiled) do
    local parts = consumer.partitions and partitions.expand(made, consumer) or { consumer }
    for _, part in ipairs(parts) do made.consumers[#made.consumers + 1] = part end
  end
  return made
end

--- Checks an app and compiles its consumers; nil and what is wrong with it.
---@param spec moonrabbit.AppOptions
---@return table|nil plan, string? problem
function plan.compile(spec)
  local made, problem = mistake.caught(compile_all, spec)
  return made, problem
end

return plan
