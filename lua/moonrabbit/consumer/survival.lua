--- How a consumer outlives its subscription: when the connection is lost, when the broker cancels it or closes
-- its channel. Meanwhile it is down (`_down`: why), and who waits for messages goes on waiting.
-- @module moonrabbit.consumer

---@class moonrabbit.Consumer
local Consumer = {}

--- Whether it is to come back by itself.
---@package
function Consumer:_may_come_back()
  return self._started and not self._ended and not self._queue_deleted and self.connection._recover.consumers or false
end

--- Its subscription is gone, and is to come back. `keep`: what has arrived may still be settled.
---@package
function Consumer:_suspend(err, keep)
  if self._ended then return end
  self._down, self._asking = self._down or err, nil
  -- Of a channel that is gone: the broker delivers them again, and nobody could settle these.
  if not keep and not self.no_ack then self:_discard() end
end

--- Asks for its deliveries again, on its channel's present core channel. Answers the calls to wait for; or
--- nil, err.
---@package
---@param level integer? of whoever asked, for error()
function Consumer:_subscribe(level)
  local channel = self.channel
  local session = channel._session
  local calls = {}
  -- The broker applies a prefetch to the consumers that start after it was told. Both go out together,
  -- so that no other task's comes between.
  if not self.no_ack and self.prefetch ~= (channel._told or 0) then
    channel._core:call("basic.qos", { prefetch_count = self.prefetch })
    channel._told = self.prefetch
    calls[1] = session:expect(channel._calls, "basic.qos")
  end
  local queue, status = channel._core:consume(self:_consume_fields(), self.prefetch)
  if not queue then
    if calls[1] then calls[1].abandoned = true end
    if status == "closed" then return nil, channel:_closed_error() end
    return nil, session:refusal(status, "Channel:consume", (level or 1) + 1)
  end
  self._session, self._asking = session, calls
  self:_takes(queue)
  channel._receivers[queue] = self
  calls[#calls + 1] = session:expect(channel._calls, "basic.consume", function()
    -- Nobody waits for it any more; where it is to come back, `_unsubscribed` has cancelled it.
    if self._ended or not self._started then self:_abandon() end
  end)
  return calls
end

--- What it asked for by these calls was refused.
---@package
function Consumer:_unsubscribed(calls, err)
  if self._asking == calls then self._asking = nil end
  if self._ended or self.channel._closed then return end
  if err.kind == "timeout" then
    -- It may have been granted after all.
    if self.channel._core:call("basic.cancel", { consumer_tag = self.tag }) then
      self._session:expect(self.channel._calls, "basic.cancel").abandoned = true
    end
  end
end

--- It consumes again. Answers why it had been down; nil when it has ended meanwhile.
---@package
function Consumer:_resumed()
  self._asking = nil
  if self._ended then
    self:_abandon()
    return nil
  end
  local why = self._down
  self._down = nil
  return why
end

--- It does not come back.
---@package
function Consumer:_give_up(err)
  local channel = self.channel
  if channel._consumers[self.tag] == self then channel._consumers[self.tag] = nil end
  self:_finish(err, true)
  self:_let_go()
end

return Consumer
