--- How a consumer ends: cancelled by its user, given up, or with its channel.
-- @module moonrabbit.consumer

local options = require "moonrabbit.options"

local huge = math.huge

---@class moonrabbit.Consumer
local Consumer = {}

-- What came and was not taken goes back, and so does what still comes.
function Consumer:_discard()
  self._deliveries:discard()
  for _, queue in ipairs(self._later or {}) do queue:discard() end
  self._session:drain()
  self._session:touch()
end

--- Ends it. `keep`: what has arrived may still be taken. `_at_end`, where somebody has put it there, is told why; it
--- must not wait.
---@package
function Consumer:_finish(err, keep)
  if self._ended then return end
  self._ended = err
  if not keep and not self.no_ack then
    -- Of a channel that is gone: the broker delivers them again, and nobody could settle these.
    self:_discard()
  end
  self._ready:broadcast()
  self.connection:_ring()
  if self._handler and keep and self:buffered() > 0 then self:_wake_worker() end
  if self._at_end then self._at_end(err) end
end

---@class moonrabbit.CancelOptions
---@field drain boolean?   what has arrived can still be taken, or is still handled; false by default
---@field timeout number?  seconds; the channel's by default

local cancel_options = { drain = options.boolean, timeout = options.seconds }

-- Waits until its handlers have ended, but for the one that calls.
local function wait_for_handlers(self, timeout, deadline)
  local current = self._runtime.current
  local me = current and current()
  local own = me and self._tasks[me] and 1 or 0
  local now = self._runtime.now
  self._drained = self._drained or self._runtime.condition()
  while self._workers > own do
    local left = deadline - now()
    if left <= 0 then
      return nil, self._session:error("timeout",
        ("%d handlers have not ended within %g s"):format(self._workers, timeout))
    end
    self._drained:wait(left < huge and left or nil)
  end
  return true
end

--- Stops it. Messages that have arrived and were not taken yet go back to the queue, unless told to
--- `drain`; with a handler the call then also waits until the last one has been handled. basic.cancel
---@param opts moonrabbit.CancelOptions?
---@return true|nil, moonrabbit.Error?
function Consumer:cancel(opts)
  opts = options.check("Consumer:cancel", opts, cancel_options)
  local channel, session = self.channel, self._session
  if self._ended then return true end
  local now = self._runtime.now
  local timeout = opts.timeout or channel.timeout
  local deadline = now() + timeout
  local result, err
  if self._down then
    result = true -- the broker knows of none; one that is being started is cancelled when the answer comes
  else
    local ok, status = channel._core:call("basic.cancel", { consumer_tag = self.tag })
    if not ok then
      if status == "closed" then return nil, channel:_closed_error() end
      return nil, session:refusal(status, "Consumer:cancel")
    end
    result, err = session:await(session:expect(channel._calls, "basic.cancel"), timeout)
  end
  if not self._ended then
    if not opts.drain and not self.no_ack then self:_discard() end
    self:_finish(session:error("cancelled", "cancelled by consumer:cancel()", { temporary = false }), true)
  end
  if channel._consumers[self.tag] == self then channel._consumers[self.tag] = nil end
  if result then channel._receivers[self._deliveries] = nil end
  self.connection:_unused(self.queue)
  if not result and not (err.kind == "closed" or err.kind == "channel") then return nil, err end
  if self._handler and (opts.drain or self._owns_channel) then
    local drained, late = wait_for_handlers(self, timeout, deadline)
    if not drained then return nil, late end
  end
  if self._owns_channel and not (opts.drain and not self._handler) and (self._workers or 0) == 0 then
    return channel:close(math.max(0, deadline - now()))
  end
  self:_let_go()
  return true
end

-- The channel that was opened for it closes as soon as nothing is left to handle or to settle there.
---@package
function Consumer:_let_go()
  if not self._owns_channel or not self._ended or self.channel._over then return end
  if (self._workers or 0) > 0 or self:buffered() > 0 then return end
  if not self._handler and self.channel:unsettled() > 0 then return end
  self.channel:_abandon()
end

-- A consumer whose start was given up, and that started after all.
function Consumer:_abandon()
  local channel = self.channel
  if channel._closed then return end
  if not self._ended then
    self._ended = self._session:error("cancelled", "nobody waited for its start any more", { temporary = false })
  end
  if channel._consumers[self.tag] == self then channel._consumers[self.tag] = nil end
  if channel._core:call("basic.cancel", { consumer_tag = self.tag }) then
    self:_discard()
    self._session:expect(channel._calls, "basic.cancel").abandoned = true
  end
end

return Consumer
