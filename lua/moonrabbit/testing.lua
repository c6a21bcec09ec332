--- Tests of apps without a broker, on a clock that the test sets.
--
--     local testing = require "moonrabbit.testing"
--
--     it("parks an order that fails five times", function()
--       local bench = testing.new "orders.lua"
--       local order = bench:deliver("orders.process", '{"id":1}', { routing_key = "order.created" })
--       assert.equal("retry", order.outcome)
--       bench:advance(3600)
--       assert.equal("dead_letter", order.outcome)
--       assert.equal(5, order.attempts)
--       assert.equal("orders.dead", bench.dead_letters[1].queue)
--     end)
--
-- Routes, policies, de-duplication, batches, breakers and canaries are the app's own, and run as they run in
-- production; the broker is not there. So what the app publishes is noted in `bench.published` and goes nowhere, and
-- bindings are not followed: `deliver` names the queue. Copies on the ladder come back when their step is over.
-- Handlers run until they wait; `moonrabbit.sleep` waits on the test's clock, sockets do not work.
-- @module moonrabbit.testing

local App = require "moonrabbit.app"
local Runner = require "moonrabbit.app.runner"
local broker = require "moonrabbit.testing.broker"
local clock = require "moonrabbit.testing.clock"
local disposal = require "moonrabbit.app.disposal"
local options = require "moonrabbit.options"
local trace = require "moonrabbit.trace"

local testing = {}

---@class moonrabbit.testing.Delivery  a message, over all its attempts
---@field outcome ("ok"|"retry"|"dead_letter"|"drop"|"duplicate"|"requeue")?  of the last attempt; nil while it runs or waits for its turn
---@field attempts integer   how often a handler has run, or a route was taken
---@field delays number[]    seconds from a failure to the next attempt, as the policy said
---@field failure moonrabbit.Failure?  the last one
---@field reason string?     why it is a dead letter, was given back, …
---@field message moonrabbit.testing.Message  as it was delivered last

---@class moonrabbit.testing.Bench
---@field app moonrabbit.App
---@field published moonrabbit.testing.Message[]     what the app has published or forwarded, the oldest first
---@field dead_letters moonrabbit.testing.Message[]  with `queue`, and the headers of a dead letter
---@field log string[]       what the app has logged: "warn: …"
---@field events table[]     what an observer hears: { name, fields }
---@field fail string?       set by a test: publishing fails with this text
local Bench = {}
Bench.__index = Bench
Bench.__name = "moonrabbit.testing.Bench"

-- ---- What the app sees ------------------------------------------------------------------------------

-- The app's own functions, but those that need a broker.
local function app_for(self)
  return setmetatable({
    _runtime = self.runtime,
    publish = function(_, body, opts)
      if trace.on then opts = trace.add(self.runtime, opts) end
      return self:_publish(body, opts)
    end,
    _channel = function() return self.channel end, -- what App:forward sends on
    _heard = function() end,
  }, { __index = self.app })
end

local function failing(self)
  if not self.fail then return nil end
  return require("moonrabbit.errors").new { kind = "nacked", message = self.fail, temporary = true }
end

---@package
function Bench:_publish(body, opts)
  options.argument("app:publish", "body", body, options.string)
  local err = failing(self)
  if err then return nil, err end
  self.published[#self.published + 1] = broker.published(self, body, opts)
  return true
end

-- A message was sent on: up the ladder, to the dead letters, or by the app.
---@package
function Bench:_arrived(made, from)
  local err = failing(self)
  if err then return nil, err end
  local wait = broker.wait_of(made.exchange)
  local delivery = self.deliveries[from]
  if wait and delivery then
    self.runtime.spawn(function()
      self.runtime.sleep(wait)
      made.exchange = made.exchange:gsub("%.wait%.%w+$", ".home")
      self:_hand_over(delivery, made)
    end)
  elseif made.exchange == "" and self.parking[made.routing_key] then
    made.queue = made.routing_key
    self.dead_letters[#self.dead_letters + 1] = made
  else
    self.published[#self.published + 1] = made
  end
  return true
end

-- ---- Runners ----------------------------------------------------------------------------------------

-- Policies that look at the time look at the test's.
local function use_clock(policy, wall)
  if type(policy) ~= "table" then return end
  if rawget(policy, "now") then policy.now = wall end
  if rawget(policy, "otherwise") then use_clock(policy.otherwise, wall) end
  for _, rule in ipairs(rawget(policy, "rules") or {}) do use_clock(rule[1], wall) end
end

local function real_disposal(self, consumer)
  local real = disposal.new {
    app = self.app.name, consumer = consumer, publisher = function() return self.channel end,
    log = function(...) self:_log(...) end, now = self.runtime.wall, outstanding = broker.settle.outstanding,
  }
  if real.parking then self.parking[real.parking] = true end
  return real
end

local function note(delivery, outcome, detail, failure)
  delivery.outcome = outcome
  if outcome == "ok" or outcome == "drop" then
    delivery.attempts = delivery.attempts + 1
  elseif outcome == "retry" or outcome == "dead_letter" then
    delivery.failure, delivery.attempts = failure, failure.attempt
  end
  if outcome == "retry" then
    delivery.delays[#delivery.delays + 1] = detail
  else
    delivery.reason = detail
  end
end

local function observer(self)
  local own = self.app._observer or {}
  local heard = setmetatable({}, { __index = own })
  function heard.settled(queue, outcome, seconds, detail, message, failure)
    local delivery = self.deliveries[message]
    if delivery then note(delivery, outcome, detail, failure) end
    if own.settled then own.settled(queue, outcome, seconds, detail, message, failure) end
  end
  function heard.event(name, fields)
    self.events[#self.events + 1] = { name = name, fields = fields }
    if own.event then own.event(name, fields) end
  end
  return heard
end

-- ---- The bench --------------------------------------------------------------------------------------

---@package
function Bench:_log(level, text) self.log[#self.log + 1] = level .. ": " .. text end

local function make_runner(self, consumer)
  use_clock(consumer.retry, self.runtime.wall)
  return Runner.new(consumer, {
    runtime = self.runtime, disposal = real_disposal(self, consumer), settle = broker.settle,
    observer = observer(self), app = app_for(self), log = function(...) self:_log(...) end,
  })
end

---@class moonrabbit.testing.Options
---@field time number?  seconds since 1970 at the beginning; the real time by default

--- A bench for an app, or for the script that returns one. Mistakes of the script throw.
---@param app moonrabbit.App|string an app, or the script's path
---@param opts moonrabbit.testing.Options?
---@return moonrabbit.testing.Bench
function testing.new(app, opts)
  opts = options.check("testing.new", opts, { time = options.seconds })
  if type(app) == "string" then
    local loaded, problem = require("moonrabbit.life.script").load(app)
    if not loaded then error("testing.new: " .. problem, 2) end
    app = loaded
  elseif not App.is(app) then
    error("testing.new: an app or the path of a script expected, not a " .. type(app), 2)
  end
  local runtime = clock.new(opts.time)
  local self = setmetatable({
    app = app, runtime = runtime, channel = broker.channel(runtime), published = {}, dead_letters = {}, log = {},
    events = {}, parking = {}, runners = {}, deliveries = setmetatable({}, { __mode = "k" }),
  }, Bench)
  for _, consumer in ipairs(app.plan.consumers) do self.runners[consumer.queue] = make_runner(self, consumer) end
  return self
end

---@package
function Bench:_hand_over(delivery, message)
  delivery.message, delivery.outcome = message, nil
  self.deliveries[message] = delivery
  self.runtime.spawn(function() delivery._runner:handle(message) end)
end

local delivery_options = {
  exchange = options.shortstr, routing_key = options.shortstr, headers = options.table, redelivered = options.boolean,
}

---@class moonrabbit.testing.DeliverOptions
---@field exchange string?        "" by default
---@field routing_key string?     the queue's name by default
---@field headers table?
---@field redelivered boolean?
---@field content_type string?    and all other properties of Channel:publish

--- Delivers a message to the consumer of a queue, and runs all that can run without time going by.
---@param queue string
---@param body string
---@param opts moonrabbit.testing.DeliverOptions?
---@return moonrabbit.testing.Delivery
function Bench:deliver(queue, body, opts)
  local runner = self.runners[queue]
  if not runner then
    local hint = options.nearest(tostring(queue), self.runners)
    error(("Bench:deliver: no consumer of a queue '%s'%s"):format(tostring(queue),
      hint and " (did you mean '" .. hint .. "'?)" or ""), 2)
  end
  options.argument("Bench:deliver", "body", body, options.string)
  opts = options.check("Bench:deliver", opts, options.merge(options.publish, delivery_options))
  local fields, properties = { routing_key = queue }, {}
  for name, value in pairs(opts) do
    if delivery_options[name] then fields[name] = value else properties[name] = value end
  end
  fields.properties = properties
  local delivery = { attempts = 0, delays = {}, _runner = runner }
  self:_hand_over(delivery, broker.message(self, body, fields))
  self.runtime.settle()
  return delivery
end

--- Moves the time, and runs what is due on the way: retries, timeouts, batches, pauses.
---@param seconds number
function Bench:advance(seconds)
  options.argument("Bench:advance", "seconds", seconds, options.seconds)
  self.runtime.advance(seconds)
end

--- The time of the test: seconds since 1970.
---@return number
function Bench:time() return self.runtime.wall() end

return testing
