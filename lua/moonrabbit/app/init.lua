--- Apps: routing, retry, dead letters and the rest, declared in one table.
--
--     local mr = require "moonrabbit"
--
--     return mr.app {
--       name = "orders",
--       exchanges = { orders = { type = "topic" } },
--       queues = { ["orders.process"] = { type = "quorum", bind = { { "orders", "order.#" } } } },
--       consumers = {
--         { queue = "orders.process", concurrency = 16, timeout = 30,
--           retry = mr.retry.exponential { first = 1, max = 60, attempts = 5 },
--           handler = function(msg) … end },
--       },
--     }
--
-- All of it is checked at once, and a mistake throws with the line of the script. `moonrabbit run` runs such a
-- script; in a script of your own, `app:run()` does, or `app:start()` and `app:stop()`.
--
-- An app has two connections, one to consume and one to publish: a broker that is short of memory stops reading
-- from connections that publish, acks included.
-- @module moonrabbit.app

local connection_options = require "moonrabbit.connection.options"
local copy = require "moonrabbit.app.copy"
local default_disposal = require "moonrabbit.app.disposal"
local Runner = require "moonrabbit.app.runner"
local ending = require "moonrabbit.app.ending"
local errors = require "moonrabbit.errors"
local observers = require "moonrabbit.app.observer"
local options = require "moonrabbit.options"
local Outgoing = require "moonrabbit.app.outgoing"
local own_channel = require "moonrabbit.app.own_channel"
local plan = require "moonrabbit.app.plan"
local protect = require "moonrabbit.protect"
local runtimes = require "moonrabbit.runtime"
local settle = require "moonrabbit.app.runner.settle"
local topology = require "moonrabbit.app.topology"
local trace = require "moonrabbit.trace"

---@class moonrabbit.App
---@field name string
---@field state "ready"|"starting"|"running"|"stopping"|"stopped"
---@field reason moonrabbit.Error?  why it ended by itself
---@field plan table                what it declares and runs, checked and filled in
---@field runners moonrabbit.app.Runner[]  while it runs
local App = {}
App.__index = App
App.__name = "moonrabbit.App"

local app = { App = App }

local function default_log(level, text)
  if level == "warn" or level == "error" then
    io.stderr:write("moonrabbit: ", level == "warn" and "warning: " or "", text, "\n")
  end
end

--- Checks and compiles an app. See moonrabbit.app.plan for the fields.
---@param spec moonrabbit.AppOptions
---@return moonrabbit.App
function app.new(spec)
  if type(spec) ~= "table" then error("mr.app: a table expected, not a " .. type(spec), 2) end
  local compiled, problem = plan.compile(spec)
  if not compiled then error("mr.app: " .. problem, 2) end
  local self = setmetatable({
    name = spec.name, plan = compiled, state = "ready", runners = {},
    _spec = spec, _log = spec.log, _consumers = {},
  }, App)
  self._observer = observers.guard(spec.observer or {}, function(...) (self._log or default_log)(...) end)
  return self
end

--- Whether a value is an app.
---@param value any
---@return boolean
function app.is(value) return getmetatable(value) == App end

--- Puts another observer in the place of the script's: what `wrap` makes of it. For who runs the app.
---@package
---@param wrap fun(observer: table): table
function App:_observed_by(wrap) self._observer = wrap(self._observer) end

-- ---- Connections ------------------------------------------------------------------------------------

local function is_connection(value)
  return type(value) == "table" and type(value.channel) == "function" and type(value.consume) == "function"
end

-- Options for one of the two connections: the same, but for its name.
local function connect_options(self, where, role)
  local opts = { uri = type(where) == "string" and where or nil }
  for key, value in pairs(type(where) == "table" and where or {}) do opts[key] = value end
  opts.name = (opts.name or self.name) .. " (" .. role .. ")"
  opts.log = opts.log or self._spec.log
  return opts
end

local function are_connections(where) return type(where) == "table" and (where.consume or where.publish) end

local function check_where(self, where)
  if are_connections(where) then
    if not (is_connection(where.consume) and is_connection(where.publish)) then
      error("app:start: consume and publish must both be connections", 3)
    end
    if where.consume == where.publish then
      error("app:start: two connections expected, one to consume and one to publish: a broker that is short of "
        .. "memory stops reading acks on one that publishes", 3)
    end
    return
  end
  if is_connection(where) then
    error("app:start: two connections expected: { consume = …, publish = … }", 3)
  end
  connection_options.check(connect_options(self, where, "consume"), 3)
end

local function connect(self, where)
  if are_connections(where) then
    self._consuming, self._publishing = where.consume, where.publish
    return true
  end
  local connector = require("moonrabbit.connection").connect
  self._owned = true
  local err
  for _, each in ipairs { { "_consuming", "consume" }, { "_publishing", "publish" } } do
    self[each[1]], err = connector(connect_options(self, where, each[2]), 5)
    if not self[each[1]] then return nil, err end
  end
  return true
end

-- The channel for a purpose on the publishing connection.
function App:_channel(purpose)
  if not self._outgoing then return nil, Outgoing.over() end
  return self._outgoing:channel(purpose)
end

-- How a publish on it ended.
function App:_heard(purpose, channel, ok, err)
  if self._outgoing then self._outgoing:heard(purpose, channel, ok, err) end
end

-- ---- Publishing -------------------------------------------------------------------------------------

-- The channel's keeper and the observer hear of it.
local function told(self, channel, started, ok, err)
  self:_heard("routes", channel, ok, err)
  local published = self._observer.published
  if published then published(self.name, self._runtime.now() - started, err) end
  return ok, err
end

--- Publishes on the app's publishing connection and waits for the confirm, as Channel:publish. In a handler it carries
--- the message's trace (moonrabbit.trace).
---@param body string
---@param opts moonrabbit.PublishOptions?
---@return true|nil, moonrabbit.Error?
function App:publish(body, opts)
  local channel, err = self:_channel "routes"
  if not channel then return nil, err end
  local started = self._runtime.now()
  return told(self, channel, started, channel:publish(body, opts))
end

--- Sends a message on, on the app's publishing connection, and waits for the confirm, as Message:forward. What
--- would deliver it elsewhere too, or be refused, stays behind: the headers CC and BCC, and user_id. So does what tells of
--- its retries here. Its `traceparent` gets a new parent id.
---@param message moonrabbit.Message
---@param exchange string
---@param key string? the one that it was published with, by default
---@param opts moonrabbit.ForwardOptions?
---@return true|nil, moonrabbit.Error?
function App:forward(message, exchange, key, opts)
  local channel, err = self:_channel "routes"
  if not channel then return nil, err end
  local all = { channel = channel, remove = copy.private_headers(), remove_properties = { "user_id" } }
  for name, value in pairs(opts or {}) do
    local list = all[name]
    if name == "remove" or name == "remove_properties" then
      for _, each in ipairs(value) do list[#list + 1] = each end
    else
      all[name] = value
    end
  end
  if self.plan.trace then all.set = trace.renew(message, all.set, all.remove) end
  local started = self._runtime.now()
  return told(self, channel, started, message:forward(exchange, key or copy.routing_key(message), all))
end

-- ---- Starting ---------------------------------------------------------------------------------------

local function disposal_for(self, consumer)
  local disposal = self._disposal or default_disposal
  return disposal.new {
    app = self.name, consumer = consumer, log = self._log, observer = self._observer,
    publisher = function() return self:_channel "copies" end,
    heard = function(...) self:_heard("copies", ...) end, outstanding = settle.outstanding,
  }
end

local function make_runner(self, consumer)
  return Runner.new(consumer, {
    runtime = self._runtime, disposal = disposal_for(self, consumer), observer = self._observer, app = self,
    log = self._log,
  })
end

local function declare_all(channel, self)
  local ok, err = topology.declare(channel, topology.steps(self.plan))
  for i = 1, ok and #self.runners or 0 do
    if ok then ok, err = self.runners[i].disposal:setup(channel) end
  end
  return ok, err
end

local function subscribe(self, runner)
  local consumer = runner.consumer
  self._consumes = true
  return self._consuming:consume(consumer.queue, {
    prefetch = consumer.prefetch, concurrency = consumer.prefetch, priority = consumer.priority,
    arguments = consumer.arguments,
  }, function(message) return runner:handle(message) end)
end

-- Why it cannot go on: a connection or a consumer has ended for good.
local function broken(self)
  for _, connection in ipairs { self._consuming, self._publishing } do
    local state, reason = connection:state()
    if state == "closed" then return reason end
  end
  for _, consumer in ipairs(self._consumers) do
    if consumer:reason() then return consumer:reason() end
  end
end

-- One after the other, until it is told to stop.
local function subscribe_all(self)
  local err = broken(self)
  for i, runner in ipairs(self.runners) do
    if err then return nil, err end
    if self._stop_by then break end
    self._consumers[i], err = subscribe(self, runner)
    err = err or broken(self)
  end
  if err then return nil, err end
  return true
end

local function begin(self, where)
  local ok, err = connect(self, where)
  if not ok then return nil, err end
  local log = self._spec.log
  self._log = log and connection_options.log(log, self._runtime) or self._consuming._log or default_log
  self._outgoing = Outgoing.new(self._runtime, self._publishing)
  for i, consumer in ipairs(self.plan.consumers) do
    self.runners[i] = make_runner(self, consumer)
    local state = self._state and self._state[consumer.queue]
    if state then self.runners[i]:restore(state) end
  end
  ok, err = own_channel(self._consuming, declare_all, self)
  if not ok then return nil, err end
  return subscribe_all(self)
end

-- ---- Start and stop ---------------------------------------------------------------------------------

local function runtime_of(where, spec)
  where = where == nil and spec.connect or where
  if type(where) == "table" then
    local connection = where.consume
    if type(connection) == "table" and connection._runtime then return connection._runtime end
    return runtimes.find(where.runtime, 4)
  end
  return runtimes.find(nil, 4)
end

--- Connects, declares what the app says, and begins to consume. Nothing is left behind when that fails.
--- With connections of your own they stay open when the app stops.
---@param where (string|moonrabbit.ConnectOptions|{ consume: moonrabbit.Connection, publish: moonrabbit.Connection })?
---@return true|nil, moonrabbit.Error?
function App:start(where)
  if self.state ~= "ready" and self.state ~= "stopped" then
    error("app:start: the app is " .. self.state .. " already", 2)
  end
  if where == nil then where = self._spec.connect end
  check_where(self, where)
  self._runtime = runtime_of(where, self._spec)
  self.state, self.reason, self.runners, self._consumers, self._owned = "starting", nil, {}, {}, false
  self._consuming, self._publishing, self._outgoing, self._offs = nil, nil, nil, {}
  self._consumes, self._stop_by = false, false -- whether it may have messages, and when it is to have stopped
  self._undone = nil                           -- what was not done by then
  self._over = self._runtime.condition()
  local whole, ok, err = protect(begin, self, where)
  if not whole or not ok then
    ending.at_once(self)
    if not whole then error(ok, 0) end
    return nil, err
  end
  if self._stop_by then
    ending.by(self, self._stop_by)
    return nil, errors.new { kind = "closed", temporary = false, message = "the app was stopped while it started" }
  end
  ending.watch(self)
  ending.turn(self, "running")
  return true
end

--- Stops: no more messages come, those that have come are handled until the deadline, acks leave, and
--- the connections close. What is not done by then goes back to its queue: nil, err of kind `timeout`. An app that is
--- starting consumes from no further queue, and its `start` fails; one that somebody else stops is waited for.
---@param deadline number? seconds; 30 by default
---@return true|nil, moonrabbit.Error?
function App:stop(deadline)
  if deadline ~= nil then options.argument("app:stop", "deadline", deadline, options.seconds) end
  if self.state == "ready" or self.state == "stopped" then return true end
  local now = self._runtime.now
  deadline = now() + math.min(deadline or ending.PATIENCE, 1e9)
  for _, runner in ipairs(self.runners) do
    if runner:is_caller() then
      error("app:stop: a handler would wait for itself: moonrabbit.spawn(function() app:stop() end)", 2)
    end
  end
  if self.state ~= "running" then return ending.wait(self, deadline) end
  ending.by(self, deadline)
  return ending.result(self)
end

--- Starts, and waits until the app is stopped, by `app:stop()` in another task, or because a connection or a consumer is
--- lost for good: nil, err.
---@param where (string|moonrabbit.ConnectOptions|table)? as for start
---@return true|nil, moonrabbit.Error?
function App:run(where)
  local ok, err = self:start(where)
  if not ok then return nil, err end
  ok, err = self:wait()
  return ok, err
end

--- Waits until the app has stopped: true, or nil, err when a connection or a consumer was lost for good.
---@return true|nil, moonrabbit.Error?
function App:wait()
  if not self._over then error("app:wait: the app has not been started", 2) end
  local over = self._over -- of this run
  while self._over == over and self.state ~= "stopped" do over:wait() end
  if self.reason then return nil, self.reason end
  return true
end

-- ---- Reload -----------------------------------------------------------------------------------------

--- What another app of the same name may take over: the state of breakers and canaries, by queue.
---@return table
function App:save()
  local all = {}
  for _, runner in ipairs(self.runners) do all[runner.queue] = runner:state() end
  return all
end

--- Takes over what `save` gave, when it starts, or at once when it runs.
---@param state table
function App:restore(state)
  self._state = state
  for _, runner in ipairs(self.runners) do
    if state[runner.queue] then runner:restore(state[runner.queue]) end
  end
end

function App:__tostring() return ("%s %s (%s)"):format(App.__name, self.name, self.state) end

return app
