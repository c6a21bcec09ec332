--- How a keeper's messages get onto the wire: in their order, as fast as the window and the buffer allow.
-- @module moonrabbit.publisher.keeper

local core = require "moonrabbit.core"
local protect = require "moonrabbit.protect"

local acked = core.acked
local min, huge = math.min, math.huge

-- Seconds after which room is looked for again when nobody says that there is some.
local LOOK_AGAIN = 0.5

local MARK = { ["moonrabbit-resent"] = true }
-- Refusals of the core that pass; and those of them after which room comes without a confirm of ours.
local passing = { window = true, overflow = true, blocked = true, memory = true, closed = true }
local without_signal = { overflow = true, blocked = true, memory = true }

---@class moonrabbit.publisher.Keeper
local Keeper = {}

-- ---- What may go out --------------------------------------------------------------------------------

-- With a window of one, what is to go again goes before anything newer.
local function held_up(self) return self._strict and self._due > 0 end

-- Whether anything may go out on the channel.
local function sends(self) return self._up and not self._renewal.by end

-- Up to which number messages may go out by themselves.
local function refresh(self)
  local ring = self.ring
  if sends(self) and not self._unsent and not self._outbox and not self._closed and ring.bytes < self._most_bytes
    and not held_up(self) then
    self.fast = ring.first - 1 + min(ring.size, self._most)
  else
    self.fast = 0
  end
end

--- Whether what the engine refuses now it may take later.
---@package
function Keeper._passes(_, status) return passing[status] end

--- The error of a message that the engine will never take.
---@package
function Keeper:_hopeless(status)
  local session = self.channel._session
  if status == "bad_argument" then
    return session:error("protocol", "the message cannot be sent: its properties are malformed", { temporary = false })
  end
  return session:refusal(status, "publish")
end

-- ---- One message ------------------------------------------------------------------------------------

local function hand(self, n, message, confirmation, marked)
  local core_channel = self.channel._core
  local route = marked and self._again or self._route
  if type(message) == "string" then return core_channel:publish_route(route, message, n, confirmation) end
  if not message.props then return core_channel:publish_route(route, message.body, n, confirmation) end
  local props = message.props
  if marked then props = core.set_headers(props, MARK) or props end
  return core_channel:publish_packed(message.exchange, message.routing_key, message.mandatory, props, message.body, n,
    confirmation)
end

-- Hands a message to the engine, `again` with the mark: its confirmation, and what `_leave` wants to know; or nil,
-- status. A message whose headers just fit goes again without the mark, rather than not at all.
local function put(self, n, message, confirmation, again)
  local marked = again or type(message) == "table" and message.again
  local ok, answer = hand(self, n, message, confirmation, marked)
  if not ok and answer == "too_large" and marked then ok, answer = hand(self, n, message, confirmation, false) end
  return ok, answer
end

--- What was put leaves, at once or with the next turn. It may throw (memory): what was put is noted before.
---@package
function Keeper:_leave(flush)
  local session = self.channel._session
  if flush then session:try_flush() elseif not session.dirty then session:touch() end
end

-- ---- All that is unsent -----------------------------------------------------------------------------

-- Sends what is to be sent, in order. Why it stopped: nil when it is done.
local function feed(self)
  local ring = self.ring
  while self._unsent do
    if not sends(self) then return "down" end
    local n = self._unsent
    local message, confirmation = ring:at(n)
    if held_up(self) and not (type(message) == "table" and message.due) then return "held" end
    local flush -- nil: nothing was put
    if message and not acked(confirmation) then
      local again = n <= self._sent
      local ok, answer = put(self, n, message, confirmation, again)
      if ok then
        self:_not_due(n, message)
        if again then self.resent = self.resent + 1 end
        flush = answer
      elseif passing[answer] then
        return answer
      else
        self:_conclude(n, "lost", self:_hopeless(answer))
      end
    end
    if n > self._sent then self._sent = n end
    self._unsent = n < ring.last and n + 1 or nil
    if flush ~= nil then self:_leave(flush) end
  end
end

-- What is thrown on the way (memory) goes on to the caller, and the rest is fed a moment later.
local function feed_once(self)
  self._feeding = true
  local whole, status = pcall(feed, self)
  self._feeding = false
  if whole then return status end
  self:_wake_at(self.runtime.now() + LOOK_AGAIN)
  error(status, 0)
end

local function pour_while_crowded(self)
  local room
  repeat
    local session = self.channel._session
    session.corked = false
    session:try_flush()
    room = session.room
    room:wait(LOOK_AGAIN)
  until not without_signal[feed_once(self)]
  room:signal() -- there may be some for others too: who is crowded still has found none, and wakes nobody
end

-- Goes on where room comes without a confirm of ours.
local function pour_on(self)
  local whole, err = protect(pour_while_crowded, self)
  self._pouring = false
  if not whole then error(err, 0) end
  refresh(self)
end

-- The same in a task, which may not be had (outside of the loop, say): then it throws.
local function pour_later(self)
  if self._pouring then return end
  self.runtime.spawn(pour_on, self)
  self._pouring = true
end

--- Sends what is unsent, now and when there is room.
---@package
function Keeper:_pour()
  if self._feeding then return end
  local status = feed_once(self)
  refresh(self)
  if without_signal[status] then pour_later(self) end
end

-- A new message goes out at once where nothing stands before it: as `put`.
local function put_now(self, n, message)
  if not sends(self) or self._unsent or held_up(self) then return nil end
  return put(self, n, message)
end

--- Starts the tasks that a message needs which is to be kept, refused by the engine with this status or by nobody. They
--- may not be had (outside of the loop, say): then it throws, and the message is not to be kept.
---@package
function Keeper:_prepare(status)
  if without_signal[status] then pour_later(self) end
  local deadline = self._policy.deadline
  if not self._up and deadline < huge then self:_wake_at(self.runtime.now() + deadline) end
end

---@package
Keeper._sends, Keeper._refresh, Keeper._put, Keeper._put_now = sends, refresh, put, put_now

return Keeper
