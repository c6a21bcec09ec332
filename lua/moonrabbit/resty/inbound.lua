--- What a worker consumes: one connection for all its consumers, kept while the worker runs.
--
-- A consumer that ends (its queue was deleted, the broker closed its channel) starts again with the same
-- backoff as a connection. When the worker leaves, consumers are cancelled, what is being handled is finished
-- within the deadline, and the rest goes back to its queue.
-- @module moonrabbit.resty.inbound

local Backoff = require "moonrabbit.connection.backoff"
local Keeper = require "moonrabbit.resty.keeper"
local described = require "moonrabbit.described"
local life = require "moonrabbit.resty.life"
local runtime = require "moonrabbit.runtime.resty"

local now = runtime.now

---@class moonrabbit.resty.Inbound
local Inbound = {}
Inbound.__index = Inbound

-- A consumer that ended before this many seconds counts as one that failed to start.
local SHORT = 2

--- config: `name`, `setup`, `connect`, `backoff`, `exit_timeout`; `watched` () -> the keeper's `watch` or nil.
---@param config table
---@return moonrabbit.resty.Inbound
function Inbound.new(config)
  return setmetatable({ config = config, subscriptions = {}, changed = nil, starts = 0 }, Inbound)
end

--- Adds a consumer. `start(conn)` -> what `stop(it, timeout)` ends, and `watch(it, fn)` calls fn at the end of; or nil, err.
---@param subscription table { name, start, stop, watch }
function Inbound:add(subscription)
  self.subscriptions[#self.subscriptions + 1] = subscription
  if self.keeper then return end
  local config = self.config
  self.keeper = Keeper.new {
    name = config.name, connect = config.connect, backoff = config.backoff, exit_timeout = config.exit_timeout,
    watch = config.watched(),
    serve = function(conn, keeper) return self:serve(conn, keeper) end,
    wanted = function() return false end,
    failed = function() end,
  }
  life.on_exit(function() if self.changed then self.changed:broadcast() end end)
end

-- Waits until something has changed, or for `seconds`.
local function wait(self, conn, seconds)
  if conn:is_open() and not life.exiting then self.changed:wait(seconds) end
end

-- Consumers begin anew with the waits of connections.
local function backoff_of(self)
  local all = { stable = SHORT }
  for key, value in pairs(self.config.backoff) do all[key] = value end
  return Backoff.new(all)
end

-- Keeps one consumer going for as long as the connection lasts.
local function keep_going(self, conn, subscription)
  local backoff = backoff_of(self)
  while conn:is_open() and not life.exiting do
    local whole, consumer, err = pcall(subscription.start, conn)
    if not whole then consumer, err = nil, consumer end
    local began = now()
    if consumer then
      subscription.running = consumer
      self.starts = self.starts + 1
      subscription.watch(consumer, function() self.changed:broadcast() end)
      while not consumer:reason() and conn:is_open() and not life.exiting do wait(self, conn) end
      if life.exiting then break end
      subscription.running = nil
      err = consumer:reason()
    end
    if not conn:is_open() then break end
    backoff:lasted(now() - began)
    local delay = backoff:next()
    runtime.log("warn", ("%s: the consumer on '%s' has ended: %s; starting again in %.1f s"):format(self.config.name,
      subscription.name, described(err), delay))
    local until_then = now() + delay
    while conn:is_open() and not life.exiting and now() < until_then do wait(self, conn, until_then - now()) end
  end
end

-- What is being handled is finished, and all at the same time.
local function stop_all(self, keeper)
  local left = #self.subscriptions
  local stopped = runtime.condition()
  for _, subscription in ipairs(self.subscriptions) do
    runtime.spawn(function()
      local consumer = subscription.running
      subscription.running = nil
      if consumer then
        local ok, err = subscription.stop(consumer, math.max(0.1, keeper.leave_by - now()))
        if not ok then runtime.log("warn", ("%s: %s"):format(self.config.name, tostring(err))) end
      end
      left = left - 1
      stopped:signal()
    end)
  end
  while left > 0 and now() < keeper.leave_by do stopped:wait(math.max(0.001, keeper.leave_by - now())) end
end

-- The task of one consumer. What is thrown in it ends the session, so that the consumer begins anew with the next.
local function live(self, conn, subscription, session)
  local whole, err = xpcall(keep_going, debug.traceback, self, conn, subscription)
  if whole then return end
  subscription.running = nil
  session.failure = session.failure or ("the consumer on '%s': %s"):format(subscription.name, described(err))
  self.changed:broadcast()
end

--- Runs in a timer of its own, for as long as the connection lasts. Returns why it ended.
function Inbound:serve(conn, keeper)
  self.changed = runtime.condition()
  local setup = self.config.setup
  if setup then
    local ok, err = setup(conn)
    if not ok and err then return err end
  end
  conn:on("closed", function() self.changed:broadcast() end)
  local session = { failure = nil } -- what was thrown in it
  for _, subscription in ipairs(self.subscriptions) do
    runtime.spawn(live, self, conn, subscription, session)
  end
  while conn:is_open() and not life.exiting and not session.failure do wait(self, conn) end
  if conn:is_open() and life.exiting then stop_all(self, keeper) end
  if session.failure then error(session.failure, 0) end
end

return Inbound
