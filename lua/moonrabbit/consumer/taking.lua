--- How messages are taken from a consumer without a handler, and where all of them lie until then.
-- @module moonrabbit.consumer

local options = require "moonrabbit.options"
local protect = require "moonrabbit.protect"
local turner = require "moonrabbit.consumer.turner"

local huge = math.huge

---@class moonrabbit.Consumer
local Consumer = {}

-- ---- Where they lie ---------------------------------------------------------------------------------

-- A `pop` that notes where in a stream its consumer is.
local function counting(consumer, pop)
  return function(queue)
    local message = pop(queue)
    local offset = message and message.headers["x-stream-offset"]
    if offset then consumer._offset = offset end
    return message
  end
end

--- Takes its messages from this DeliveryQueue, after those that have arrived in the one before.
---@package
function Consumer:_takes(queue)
  self._pop = self._reads_stream and counting(self, queue.pop) or queue.pop
  if self._deliveries and self:buffered() > 0 then
    self._later = self._later or {}
    self._later[#self._later + 1] = queue
  else
    self._deliveries, self._later = queue, nil
  end
end

--- How many messages have arrived and were not taken yet.
---@return integer
function Consumer:buffered()
  local n = self._deliveries:count()
  for _, queue in ipairs(self._later or {}) do n = n + queue:count() end
  return n
end

-- Deliveries came to an empty queue. Called by the session; must not yield.
---@package
function Consumer:_delivered()
  if not self._handler then
    if self._receiving > 0 or self._ready.bell then self._ready:signal() end
    self.connection:_ring_for(self)
    return
  end
  self:_wake_worker()
end

-- The next message, after a DeliveryQueue that is empty that of the subscription after it.
local function take(self)
  local pop = self._pop
  local message = pop(self._deliveries)
  local later = self._later
  while not message and later and later[1] do
    self._deliveries = table.remove(later, 1)
    message = pop(self._deliveries)
  end
  return message
end

---@package
Consumer._take = take

-- ---- Taking them ------------------------------------------------------------------------------------

local function receive(self, timeout)
  local message = take(self)
  if message then return message end
  if self._ended then
    self:_let_go()
    return nil, self._ended
  end
  self._session:drain()
  local now = self._runtime.now
  local deadline = timeout < huge and now() + timeout
  local ready = self._ready
  self._receiving = self._receiving + 1
  self._waited_on = self._waited_on or timeout > 0
  repeat
    local left
    if deadline then
      left = deadline - now()
      if left <= 0 and timeout > 0 then break end
    end
    local whole, err = protect(ready.wait, ready, left and math.max(0, left))
    if not whole then -- cancelled: another one has what it may have been woken for
      self._receiving = self._receiving - 1
      if self._receiving > 0 and self:buffered() > 0 then ready:signal() end
      error(err, 0)
    end
    message = take(self)
    if message or timeout == 0 then break end
  until self._ended
  self._receiving = self._receiving - 1
  if message then
    if self._receiving > 0 and self._deliveries:count() > 0 then ready:signal() end
    return message
  end
  if self._ended then
    self:_let_go()
    return nil, self._ended
  end
  return nil, self._session:error("timeout", ("no message within %g s"):format(timeout)
    .. (self._down and " (the consumer is coming back: " .. self._down.message .. ")" or ""))
end

--- Takes the next message, waiting for one, also while the consumer is coming back. err.kind `timeout`: none
--- came; anything else: the consumer has ended, as Consumer:reason says.
---@param timeout number? seconds; nil: for ever; 0: only what has arrived
---@return moonrabbit.Message|nil, moonrabbit.Error?
function Consumer:receive(timeout)
  if timeout ~= nil then options.argument("Consumer:receive", "timeout", timeout, options.seconds) end
  if self._handler then error("Consumer:receive: this consumer has a handler", 2) end
  if timeout ~= 0 then
    self._turn = self._turn or turner(self._runtime)
    self._until_turn = (self._until_turn or 1) - 1
    if self._until_turn <= 0 then self._until_turn = self._turn() end
  end
  return receive(self, timeout or huge)
end

--- Iterates over the messages until the consumer ends; Consumer:reason tells why it did. Waits for each in
--- the way of the runtime: in a task it yields, in a plain script it runs the event loop.
---@return fun(): moonrabbit.Message?
function Consumer:messages()
  if self._handler then error("Consumer:messages: this consumer has a handler", 2) end
  self._waited_on = true
  local queue, pop = self._deliveries, self._pop
  local turn, countdown = turner(self._runtime), 1
  return function()
    countdown = countdown - 1
    if countdown == 0 then countdown = turn() end
    local message = pop(queue)
    if message then return message end
    message = receive(self, huge)
    queue = self._deliveries -- of the present subscription
    return message
  end
end

return Consumer
