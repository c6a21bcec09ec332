--- How a run of an app ends: by its deadline, at once, or by itself.
-- @module moonrabbit.app

local errors = require "moonrabbit.errors"
local protect = require "moonrabbit.protect"

local ending = {}

--- Seconds that what has come may take, unless somebody says otherwise.
ending.PATIENCE = 30

-- Hears no more of what this run has, and returns what closes it: that waits, and the app may start again meanwhile.
local function closer(self)
  local consumers, outgoing = self._consumers, self._outgoing
  local connections = self._owned and { self._publishing, self._consuming } or {}
  for _, off in ipairs(self._offs) do off() end
  return function(timeout)
    for _, consumer in ipairs(consumers) do
      if consumer.channel:is_open() then consumer.channel:close(timeout) end
    end
    if outgoing then outgoing:close(timeout) end
    for _, connection in pairs(connections) do connection:close(timeout) end
  end
end

--- The app is in another state: who waits for that hears of it.
---@param self moonrabbit.App
---@param state string
function ending.turn(self, state)
  self.state = state
  self._over:broadcast()
end

-- Nothing is handled any more; what waits goes back.
local function abort(self)
  for _, runner in ipairs(self.runners) do
    runner:abort()
    if runner.disposal.stop then runner.disposal:stop() end
  end
end

--- It ends at once, whether it has begun or not. What takes a while comes last: who waits for the end may go on.
---@param self moonrabbit.App
function ending.at_once(self)
  local close = closer(self)
  abort(self)
  ending.turn(self, "stopped")
  close(1)
end

-- Seconds between two looks whether there is more than handlers that nobody can end.
local LOOK = 0.1

-- Whether all that runs yet are handlers whose time is over: their messages have their outcome, nobody waits for them.
local function only_stuck(self)
  for i, consumer in ipairs(self._consumers) do
    local runner = self.runners[i]
    if not consumer:reason() or consumer:buffered() > 0 or runner.in_flight > 0 then return false end
  end
  return true
end

-- No more deliveries; what has arrived is handled, until the deadline.
local function cancel_all(self, deadline)
  local runtime = self._runtime
  local left, done = #self._consumers, runtime.condition()
  for _, consumer in ipairs(self._consumers) do
    runtime.spawn(function()
      consumer:cancel { drain = true, timeout = math.max(0, deadline - runtime.now()) }
      left = left - 1
      done:signal()
    end)
  end
  while left > 0 and runtime.now() < deadline and not only_stuck(self) do
    done:wait(math.min(LOOK, math.max(0, deadline - runtime.now())))
  end
end

-- Handles what has come until the deadline, gives back the rest, and closes.
local function drain(self, deadline)
  for _, runner in ipairs(self.runners) do
    runner:stop()
    if runner.disposal.stop then runner.disposal:stop() end
  end
  cancel_all(self, deadline)
  local left = 0
  for _, runner in ipairs(self.runners) do
    if not runner:drained(deadline) then left = left + runner.in_flight end
  end
  for _, runner in ipairs(self.runners) do runner:abort() end
  if left > 0 then self._runtime.sleep(0) end -- what was cancelled gives its messages back
  closer(self)(5)
  if left > 0 then
    self._undone = errors.new { kind = "timeout", temporary = true,
      message = ("%d messages were not done in time and have gone back to their queues"):format(left) }
  end
  ending.turn(self, "stopped")
end

--- It ends by the deadline: what has come is handled, and the rest given back. It has stopped even where the task that
--- does it is cancelled.
---@param self moonrabbit.App
---@param deadline number  in the runtime's time
function ending.by(self, deadline)
  self._stop_by = deadline
  ending.turn(self, "stopping")
  local whole, problem = protect(drain, self, deadline)
  if whole then return end
  ending.at_once(self)
  error(problem, 0)
end

local function log_loss(self, what, err)
  self._log("error", ("the app '%s' has lost %s: %s"):format(self.name, what, tostring(err)))
  self.reason = err
end

-- The other connection may go on, and would bring message after message.
local function lost_connection(self, err)
  if self.state ~= "running" then return end
  log_loss(self, "its connection", err)
  ending.at_once(self)
end

-- Its connection goes on: what has come can be handled, and acked. One that ends with its connection is not told of.
local function lost_consumer(self, consumer, err)
  if self.state ~= "running" or self._consuming:state() == "closed" then return end
  log_loss(self, ("the consumer of '%s'"):format(consumer.queue), err)
  ending.by(self, self._runtime.now() + ending.PATIENCE)
end

local function watch_consumer(self, consumer)
  consumer._at_end = function(err)
    if self.state == "running" then self._runtime.spawn(lost_consumer, self, consumer, err) end
  end
  self._offs[#self._offs + 1] = function() consumer._at_end = nil end
end

--- It ends when something of it ends for good.
---@param self moonrabbit.App
function ending.watch(self)
  for _, connection in ipairs { self._consuming, self._publishing } do
    self._offs[#self._offs + 1] = connection:on("closed", function(err) lost_connection(self, err) end)
  end
  for _, consumer in ipairs(self._consumers) do watch_consumer(self, consumer) end
end

--- After it has stopped: true, or nil and what was not done.
---@param self moonrabbit.App
---@return true|nil, moonrabbit.Error?
function ending.result(self)
  if self._undone then return nil, self._undone end
  return true
end

--- It is starting, and that ends now; or somebody else stops it. What gives up by the deadline is waited for as long as
--- that takes, as who stops it himself does.
---@param self moonrabbit.App
---@param deadline number  in the runtime's time
---@return true|nil, moonrabbit.Error?
function ending.wait(self, deadline)
  if self.state == "starting" then
    self._stop_by = math.max(self._stop_by or deadline, deadline)
    if not self._consumes then return true end
  end
  local over, now = self._over, self._runtime.now -- of this run
  while self._over == over and self.state ~= "stopped" do
    local ends = self.state == "stopping" and self._stop_by <= deadline
    if not ends and now() >= deadline then
      return nil, errors.new { kind = "timeout", message = "the app was still " .. self.state }
    end
    over:wait(not ends and deadline - now() or nil)
  end
  return ending.result(self)
end

return ending
