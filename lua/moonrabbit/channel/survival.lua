--- How a channel outlives what it runs on: the connection's session, or the broker's own channel.
--
-- A Channel stands on a core channel of a session. When that is gone, the object waits (calls answer `closed`
-- with err.temporary) until moonrabbit.connection.recovery has put it on another one. `_closed` is what calls
-- are told now, nil while it is open; `_over` is set once it has ended for good.
-- @module moonrabbit.channel

---@class moonrabbit.Channel
local Channel = {}

local serial = 0

--- It is to survive: the connection knows it.
---@package
function Channel:_survive()
  local connection = self.connection
  if not connection._policy or self._closed then return end
  serial = serial + 1
  self._serial, self._lasting, self.kind = serial, true, "channel"
  connection._channels[self] = true
end

--- Calls hooks.lost(err) when its core channel is gone, with every publish settled or lost, hooks.recovered()
--- when it is usable again, hooks.ended(err) when it is over for good (after `lost`); each may be missing,
--- and none may yield. A watched channel is opened again when the broker closes it. Answers a function that
--- takes the hooks off.
---@package
---@param hooks { lost: function?, recovered: function?, ended: function? }
---@return function off
function Channel:_watch(hooks)
  self._watchers = self._watchers or {}
  self._watchers[hooks] = true
  return function() self._watchers[hooks] = nil end
end

local function tell(self, what, err)
  for hooks in pairs(self._watchers or {}) do
    if hooks[what] then hooks[what](err) end
  end
end

-- Who waits on the core channel that is gone learns why.
local function let_go(self, err, quiet)
  self._session.channels[self] = nil
  if not quiet then
    self._calls:fail(err)
    local core_channel = self._core
    local lost = core_channel:lost() + core_channel:unconfirmed()
    if lost > 0 then self._lost, self._lost_by = (self._lost or 0) + lost, err end
  end
  self._returns = nil
  self._waiters:release()
  for _, receiver in pairs(self._receivers) do
    if receiver._channel_ended then receiver:_channel_ended(err) end
  end
  self._receivers = {}
  self._room:broadcast()
  self._settled:broadcast()
  self._session.room:broadcast() -- its publishers may wait there
end

-- Its core channel is gone, and another one is to come. `meanwhile`: what calls are told.
local function detach(self, err, meanwhile)
  local was_usable = not self._closed
  self._closed = meanwhile
  let_go(self, err)
  for tag, consumer in pairs(self._consumers) do
    if consumer:_may_come_back() then
      consumer:_suspend(err)
    else
      self._consumers[tag] = nil
      consumer:_finish(err, false)
    end
  end
  if was_usable then
    tell(self, "lost", err)
    self:_emit("lost", err)
  end
end

--- Its session has ended. `meanwhile`: what calls are told until it is back; nil: it does not come back.
---@package
function Channel:_session_ended(err, meanwhile)
  if meanwhile and self._lasting then detach(self, err, meanwhile) else self:_ended(err) end
end

--- Whether somebody would miss it.
local function is_needed(self)
  if next(self._watchers or {}) then return true end
  for _, consumer in pairs(self._consumers) do
    if consumer:_may_come_back() then return true end
  end
  return false
end

--- The broker closed it.
---@package
function Channel:_closed_by_broker(err)
  local connection = self.connection
  if not self._lasting or not connection._policy or connection._state == "closing" or not is_needed(self) then
    return self:_ended(err)
  end
  if self._closed then -- while it was being opened again
    self._calls:fail(err)
    return
  end
  local meanwhile = require("moonrabbit.connection.recovery").meanwhile
  detach(self, err, meanwhile(err, "the broker closed the channel, which is being opened again"))
  connection._repairs:add("channel", self, err)
end

--- Leaves its core channel for another one, as if the broker had closed it. Does nothing where it does not survive.
---@package
---@param why moonrabbit.Error
function Channel:_renew(why)
  local connection = self.connection
  if self._closed or not self._lasting or connection._state ~= "open" then return end
  local session = self._session
  self._core:close(200, "Goodbye")
  session:touch()
  local meanwhile = require("moonrabbit.connection.recovery").meanwhile
  local err = meanwhile(why, "the channel is left for another one")
  detach(self, err, err)
  connection._repairs:add("channel", self, err)
end

--- The channel is over. `quiet`: by this side, so it is no event.
---@package
function Channel:_ended(err, quiet)
  if self._over then return end
  local was_usable = not self._closed
  self._over, self._closed = true, err
  local connection = self.connection
  connection._channels[self] = nil
  let_go(self, err, quiet)
  local consumers = self._consumers
  self._consumers = {}
  for _, consumer in pairs(consumers) do
    consumer:_finish(err, false)
    if quiet then connection:_unused(consumer.queue) end
  end
  if was_usable then tell(self, "lost", err) end
  tell(self, "ended", err)
  if not quiet then self:_emit("close", err) end
end

-- ---- On another core channel --------------------------------------------------------------------------

--- Opens a core channel in a session and asks for everything that it was set to. Answers the calls to wait
--- for, or nil, err.
---@package
---@param late function? called when an answer comes that nobody waits for any more
function Channel:_attach(session, late)
  local core_channel, status = session.engine:open_channel(self)
  if not core_channel then return nil, session:refusal(status, "Connection:channel") end
  self:_bind(core_channel)
  self._core, self._session = core_channel, session
  session.channels[self] = true
  if self._window then core_channel:set_window(self._window) end
  -- All in one go: the answers come in order, the last one says that everything is done.
  local calls = { session:expect(self._calls, "channel.open", late) }
  local function ask(method, fields)
    core_channel:call(method, fields)
    calls[#calls + 1] = session:expect(self._calls, method, late)
  end
  if self.confirm then ask("confirm.select", {}) end
  if self._tx then ask("tx.select", {}) end
  if self._prefetch_global then ask("basic.qos", { prefetch_count = self._prefetch_global, global = true }) end
  if self._prefetch then ask("basic.qos", { prefetch_count = self._prefetch }) end
  self._told = self._prefetch
  return calls
end

--- What `_attach` began was refused, or is not wanted any more.
---@package
function Channel:_unattach()
  local session = self._session
  session.channels[self] = nil
  self._calls:fail(self._closed)
  self._core:close(200, "Goodbye")
  session:touch()
end

--- It can be used again.
---@package
function Channel:_resume()
  self._closed = nil
  tell(self, "recovered")
  self:_emit "recovered"
end

--- The broker gave a queue another name.
---@package
function Channel:_queue_renamed(old, new)
  if self._last_queue == old then self._last_queue = new end
  for _, consumer in pairs(self._consumers) do
    if consumer.queue == old then consumer.queue = new end
  end
end

return Channel
