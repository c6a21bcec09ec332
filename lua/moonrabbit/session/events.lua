--- What the engine has to tell: each event goes to whom it concerns. Nothing here may yield: what may (the user's
-- functions) runs in tasks.
-- @module moonrabbit.session

local Calls = require "moonrabbit.session.calls"

local resolve = Calls.resolve

---@class moonrabbit.Session
local Session = {}

-- Event of the engine -> fn(session, ...).
local handlers = {}

-- ---- Of the connection ------------------------------------------------------------------------------

function handlers.open(self)
  if self.state == "connecting" then self:opened() end
end

function handlers.blocked(self, reason)
  self.blocked = reason or ""
  self.emit("blocked", reason)
end

function handlers.unblocked(self)
  self.blocked = nil
  self.room:signal()
  for channel in pairs(self.channels) do channel._room:signal() end
  self.emit("unblocked")
end

function handlers.closed(self, report)
  local err = self.verdict or self:report(report)
  if err.kind == "timeout" and not err.strategy and self.heartbeat > 0 then
    err.strategy = "fixed" -- the core's own: two heartbeat intervals
    self.emit("suspect", err.strategy, err.message)
  end
  self:finish(err)
end

-- ---- Answers ----------------------------------------------------------------------------------------

-- "queue.declare" of "queue.declare-ok"
local asked = setmetatable({}, {
  __index = function(self, reply)
    local method = reply:gsub("%-ok$", ""):gsub("%-empty$", "")
    self[reply] = method
    return method
  end,
})

function handlers.reply(self, owner, method, fields)
  local call = (owner and owner._calls or self.calls):pop(asked[method])
  if call then resolve(call, true, fields or {}, method) end
end

function handlers.get(_, owner, message)
  local call = owner._calls:pop "basic.get"
  if call then resolve(call, true, message, "basic.get-ok") end
end

-- ---- Of channels ------------------------------------------------------------------------------------

function handlers.deliver(_, owner, queue)
  local receiver = owner._receivers[queue]
  if receiver then receiver:_delivered() end
end

function handlers.confirm(_, owner)
  owner:_confirmed()
end

function handlers.failed(_, owner, seq, outcome, confirmation)
  owner:_failed(seq, outcome, confirmation)
end

handlers["return"] = function(self, owner, message, seq)
  owner:_returned(message, seq)
  self.emit("return", message, owner)
end

function handlers.cancel(_, owner, consumer_tag, queue)
  owner:_consumer_cancelled(consumer_tag, queue)
end

function handlers.flow(self, owner, active)
  owner:_flow(active)
  if active then self.room:broadcast() end -- only who waits on that channel has room, and is not known here
end

function handlers.channel_closed(self, owner, report)
  owner:_closed_by_broker(self:report(report))
end

-- ---- Taking them ------------------------------------------------------------------------------------

--- Takes every event there is. Returns how many there were.
---@return integer
function Session:pump()
  local engine = self.engine
  local n = 0
  local event, a, b, c, d = engine:pump()
  while event do
    n = n + 1
    handlers[event](self, a, b, c, d)
    event, a, b, c, d = engine:pump()
  end
  if not self.dirty and engine:pending() > 0 then self:touch() end -- its answers
  return n
end

return Session
