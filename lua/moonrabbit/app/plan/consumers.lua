--- The consumers of an app, checked.
-- @module moonrabbit.app.plan.consumers

local Ladder = require "moonrabbit.app.ladder"
local compile = require "moonrabbit.app.route.compile"
local cycles = require "moonrabbit.app.cycles"
local entities = require "moonrabbit.app.plan.entities"
local fields = require "moonrabbit.app.plan.fields"
local mistake = require "moonrabbit.app.plan.mistake"
local partitions = require "moonrabbit.app.flow.partitions"
local route = require "moonrabbit.app.route"

local bad, check = mistake.bad, mistake.check

local consumers = {}

-- ---- Flow and de-duplication ------------------------------------------------------------------------

local function check_batch(what, consumer)
  local batch = consumer.batch
  if not batch then return end
  check(what .. ".batch", batch, fields.batch)
  if not batch.size or not batch.wait then bad("%s.batch: size and wait are both needed", what) end
  if not consumer.handler then bad("%s: batch goes with a handler, not with a route", what) end
  if consumer.order_by then bad("%s: batch and order_by exclude each other", what) end
  if consumer.prefetch and consumer.prefetch < batch.size then
    bad("%s: a batch of %d never fills with a prefetch of %d", what, batch.size, consumer.prefetch)
  end
end

local function check_flow(what, consumer)
  check_batch(what, consumer)
  if type(consumer.rate) == "table" then
    check(what .. ".rate", consumer.rate, fields.rate)
    if not consumer.rate.limit then bad("%s.rate: the limit is missing: messages a second", what) end
  end
  if consumer.breaker then
    check(what .. ".breaker", consumer.breaker, fields.breaker)
    if not consumer.breaker.failures then bad("%s.breaker: failures is missing: how many", what) end
  end
end

local function check_partitions(what, spec, consumer)
  local given = consumer.partitions
  if not given then return end
  local problem = partitions.problem(spec.queues[consumer.queue])
  if problem then bad("%s.partitions: %s", what, problem) end
  if type(given) ~= "table" then return end
  check(what .. ".partitions", given, fields.partition)
  if not given.count then bad("%s.partitions: the count is missing", what) end
  if not given.by then return end
  check(what .. ".partitions.by", given.by, fields.by)
  if (given.by.header == nil) == (given.by.property == nil) then
    bad("%s.partitions.by: one of header and property expected", what)
  end
end

local function check_dedupe(what, dedupe)
  if not dedupe then return end
  local store = dedupe.store or dedupe
  if dedupe.store then check(what .. ".dedupe", dedupe, fields.dedupe) end
  for _, name in ipairs { "begin", "commit", "abort" } do
    if type(store[name]) ~= "function" then bad("%s.dedupe: the store has no function '%s'", what, name) end
  end
end

--- Whether it commits the handlers' own transaction.
---@param consumer moonrabbit.AppConsumerOptions
function consumers.joins(consumer)
  local dedupe = consumer.dedupe
  return dedupe and (dedupe.store or dedupe).joined
end

-- ---- Retries and dead letters -----------------------------------------------------------------------

--- A table of options for a ladder, or its name; nothing is made of it yet.
---@param what string
---@param given string|table|nil
---@param app string
function consumers.check_ladder(what, given, app)
  if type(given) == "table" and getmetatable(given) ~= nil then return end -- one that is made
  local opts = { name = given or app }
  if type(given) == "table" then
    opts = { name = app }
    for key, value in pairs(given) do opts[key] = value end
  end
  local ok, problem = pcall(Ladder.new, opts, -1)
  if not ok then bad("%s.%s", what, problem) end
end

-- Where failed messages go must not be where they come from.
local function check_dead_letter(what, spec, consumer)
  local queue = consumer.dead_letter
  if queue == nil then queue = spec.name .. ".dead" end
  if queue == consumer.queue then
    bad("%s.dead_letter: a cycle: its dead letters would come back to its own queue '%s'", what, queue)
  end
end

-- ---- Routes -----------------------------------------------------------------------------------------

--- Its target, compiled.
---@param what string
---@param spec moonrabbit.AppOptions
---@param consumer moonrabbit.AppConsumerOptions
---@return table
function consumers.check_route(what, spec, consumer)
  local compiled, problem = compile.compile(consumer.handler or consumer.route)
  if not compiled then bad("%s.route: %s", what, problem) end
  for _, send in ipairs(compiled.sends) do
    if cycles.reaches(spec, send, consumer.queue) then
      bad("%s.route: a cycle: what route.%s (%s) sends, unchanged, comes back to this consumer's own queue '%s'", what,
        send.kind, send.where, consumer.queue)
    end
  end
  return compiled
end

-- ---- All of it --------------------------------------------------------------------------------------

---@param what string
---@param spec moonrabbit.AppOptions
---@param consumer moonrabbit.AppConsumerOptions
function consumers.check(what, spec, consumer)
  check(what, consumer, fields.consumer)
  if not consumer.queue or consumer.queue == "" then bad("%s: the queue is missing", what) end
  entities.known(what, "queue", consumer.queue, spec.queues or {})
  if consumer.handler == nil and consumer.route == nil then
    bad("%s: it has neither a handler nor a route: handler = function(message) … end", what)
  end
  if consumer.handler ~= nil and consumer.route ~= nil then bad("%s: handler and route exclude each other", what) end
  local problem = consumer.route ~= nil and route.no_target(consumer.route)
  if problem then bad("%s.route: %s", what, problem) end
  check_flow(what, consumer)
  check_partitions(what, spec, consumer)
  check_dedupe(what, consumer.dedupe)
  if consumer.ladder ~= nil then consumers.check_ladder(what, consumer.ladder, spec.name) end
  check_dead_letter(what, spec, consumer)
  if consumer.batch and consumers.joins(consumer) then
    bad("%s: batch and a de-duplication store in a transaction of your own exclude each other", what)
  end
end

return consumers
