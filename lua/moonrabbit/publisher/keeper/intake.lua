--- How a keeper takes messages, from who has one to give and from an outbox, while there is room.
-- @module moonrabbit.publisher.keeper

local sending = require "moonrabbit.publisher.keeper.sending"

local put_now, refresh = sending._put_now, sending._refresh

---@class moonrabbit.publisher.Keeper
local Keeper = {}

local function closed_error(self)
  local session = self.channel._session
  local reason = self._closed or session.reason
  return reason or session:error("closed", "the publisher is closed", { temporary = false })
end

local function takes(self) return not self._closed and self.channel._session.state ~= "closing" end

-- ---- Room -------------------------------------------------------------------------------------------

-- Why nothing is taken now: nil when something is.
local function full(self)
  local ring = self.ring
  if self._outbox and self._outbox.backlog then return "the outbox still holds messages from before" end
  if ring:count() >= self._most then return ("%d messages are kept already"):format(ring:count()) end
  if ring.bytes >= self._most_bytes and ring:count() > 0 then
    return ("%d bytes of messages are kept already"):format(ring.bytes)
  end
end

-- The error of a message that was not taken in time.
local function no_room(self, why, timeout)
  if self._outbox and self._outbox.problem then return self._outbox.problem end
  local session = self.channel._session
  local blocked, held = session.blocked, session.held
  return session:error((blocked or held) and "blocked" or "overflow",
    ("the message was not taken%s: %s%s"):format(timeout > 0 and (" within %g s"):format(timeout) or "", why,
      held and ", and " .. held or blocked and ", and the broker has blocked publishing" or ""))
end

--- Waits until one more may be taken, until `deadline`.
---@return true|nil, moonrabbit.Error?
function Keeper:room(deadline, timeout)
  local now, waited = self.runtime.now, false
  repeat
    if self._closed then return nil, closed_error(self) end
    local why = full(self)
    if not why then
      if waited then self._room:signal() end
      return true
    end
    local session = self.channel._session
    session.corked = false
    session:try_flush()
    local left = deadline - now()
    if left <= 0 then return nil, no_room(self, why, timeout) end
    session:block(self._room, left)
    waited = true
  until false
end

-- ---- Taking -----------------------------------------------------------------------------------------

-- What is new is stored before it is sent: whether it was, or nil, err.
local function store(self, message)
  if message.row then return false end
  local row, err = self._outbox:add(message)
  if not row then return nil, err end
  message.row = row
  return true
end

-- What was stored for it is done with: its sender is told that it was not taken.
local function give_back(self, message) self._outbox:done(message.row) end

-- A message that is to be kept is looked after, or not kept.
local function prepare(self, message, stored, status)
  local whole, problem = pcall(self._prepare, self, status)
  if whole then return end
  if stored then pcall(give_back, self, message) end -- it wants a task, too
  error(problem, 0)
end

--- Takes a message, for which there is room: its confirmation. Never waits.
---@param message string|table a body for the route, or a record
---@return moonrabbit.Confirmation|nil, moonrabbit.Error?
function Keeper:take(message)
  local ring = self.ring
  if not takes(self) then return nil, closed_error(self) end
  local stored, err
  if self._outbox then
    stored, err = store(self, message)
    if err then return nil, err end
  end
  ring:reserve()
  local n = ring.last + 1
  if type(message) == "table" then message.number = n end
  local confirmation, answer = put_now(self, n, message)
  if not confirmation then
    if answer and not self:_passes(answer) then
      if stored then give_back(self, message) end
      return nil, self:_hopeless(answer)
    end
    prepare(self, message, stored, answer)
  end
  ring:add(message, confirmation or self._core:hold(n))
  if not confirmation then
    self._unsent = self._unsent or n
    if not self._up then self:_trouble(n) end
  end
  refresh(self)
  if confirmation then self:_leave(answer) end
  local _, mine = ring:at(n)
  return mine
end

--- Gives the ring what the outbox holds from before, as far as there is room.
---@package
function Keeper:_load()
  local outbox = self._outbox
  while takes(self) and self.ring:count() < self._most and self.ring.bytes < self._most_bytes do
    local record = outbox:next()
    if not record then break end
    local confirmation, err = self:take(record)
    if not confirmation then outbox:refused(record.row, err) end
  end
  if not outbox.backlog then self._room:signal() end
end

return Keeper
