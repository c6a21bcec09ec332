--- What a keeper does at its time: a refused message goes again, one that has been in trouble for too long is given
-- up, and a channel that refuses again and again is left (moonrabbit.publisher.renewal).
--
-- A record is in trouble while it has a time: `due`, when it goes again, or `give_up`, the policy's deadline.
-- @module moonrabbit.publisher.keeper

local core = require "moonrabbit.core"
local protect = require "moonrabbit.protect"

local acked = core.acked
local min, huge = math.min, math.huge

-- Seconds after which a message whose time has come is looked at again where nothing may go out.
local LOOK_AGAIN = 0.5
-- The same where there was no room.
local NO_ROOM_PAUSE = 0.05

---@class moonrabbit.publisher.Keeper
local Keeper = {}

-- ---- Messages in trouble ----------------------------------------------------------------------------

--- Kept for the time being: how long is the policy's business.
---@package
function Keeper:_trouble(n)
  local deadline = self._policy.deadline
  if deadline == huge then return end
  local record = self.ring:record(n)
  record.give_up = record.give_up or self.runtime.now() + deadline
  self._troubled[n] = record
  self:_wake_at(record.give_up)
end

--- A message that was refused goes again at this time.
---@package
function Keeper:_go_later(n, record, due)
  record.due = due
  self._due = self._due + 1
  self._troubled[n] = record
  self:_wake_at(due)
end

--- A message is on the wire again, or done with.
---@package
function Keeper:_not_due(n, record)
  if type(record) ~= "table" then return end
  if record.due then
    record.due = nil
    self._due = self._due - 1
  end
  if not record.give_up then self._troubled[n] = nil end
end

local function go_again(self, n, record, now)
  if not self:_sends() or self._unsent and n >= self._unsent then
    record.due = now + LOOK_AGAIN -- it goes with the next channel, or in its turn
    return
  end
  local message, confirmation = self.ring:at(n)
  local ok, answer = self:_put(n, message, confirmation, true)
  if ok then
    self:_not_due(n, record)
    self.resent = self.resent + 1
    self:_leave(answer)
  elseif self:_passes(answer) then
    record.due = now + NO_ROOM_PAUSE
  else
    self:_conclude(n, "lost", self:_hopeless(answer))
  end
end

local function give_up(self, n, record)
  local err = record.err
  self:_conclude(n, record.outcome or "lost", self.channel._session:error(err and err.kind or "timeout",
    ("given up after %g s (retry.deadline): %s"):format(self._policy.deadline,
      err and err.message or "the broker has not confirmed the message, whose outcome is unknown"),
    err and { code = err.code, class = err.class, method = err.method }))
end

-- ---- Leaving a channel ------------------------------------------------------------------------------

-- A message that is due, until this time, and may do better on another channel; whether for one of them nothing else is
-- to be waited for.
local function badly_served(self, now, due)
  local renewal, attempts, served = self._renewal, self._policy.attempts, nil
  for _, record in pairs(self._troubled) do
    if record.due and record.due <= due then
      if renewal:insists(record, attempts, now) then return record, true end
      if renewal:helps(record, now) then served = record end
    end
  end
  return served, false
end

-- What was refused here has had another channel then.
local function leave(self, why)
  for _, record in pairs(self._troubled) do record.moved = record.outcome == "nacked" end
  self.channel:_renew(why)
end

-- Leaves the channel for such a message, once nothing is under way on it.
local function renew(self, now)
  local renewal = self._renewal
  if not self._up then return end
  if not renewal.by then
    local record = badly_served(self, now, now)
    if not record then return end
    renewal:begin(record.err, now)
  end
  local idle = self.channel._core:unconfirmed() == 0
  if not idle and now < renewal.by then return self:_wake_at(renewal.by) end
  local _, insists = badly_served(self, now, huge)
  -- Where it is idle, nothing goes out twice; but who insists does not wait until channels may be left again.
  if insists and (not idle or now < renewal.at) then renewal:copied(now) end
  local why = renewal:over(now)
  if idle or insists then leave(self, why) end
end

-- ---- The task that keeps the times ------------------------------------------------------------------

-- Does what is to be done for one of them; when it is to be looked at again.
local function look_after(self, n, now)
  local record = self._troubled[n]
  local message, confirmation = self.ring:at(n)
  if not message or acked(confirmation) then
    self._troubled[n] = nil
  elseif record then
    if record.give_up and record.give_up <= now then
      give_up(self, n, record)
    elseif record.due and record.due <= now then
      go_again(self, n, record, now)
    end
  end
  record = self._troubled[n]
  return record and min(record.due or huge, record.give_up or huge) or huge
end

-- Does what is due, the oldest first; when there is something again.
local function tend(self)
  renew(self, self.runtime.now())
  local numbers, now, next_time = {}, self.runtime.now(), huge
  for n in pairs(self._troubled) do numbers[#numbers + 1] = n end
  table.sort(numbers)
  for _, n in ipairs(numbers) do next_time = min(next_time, look_after(self, n, now)) end
  if self._unsent then self:_pour() end
  self:_refresh()
  return next_time
end

-- What was thrown (memory) is told by this task's end; another one keeps the time.
local function hand_over(self, err)
  self._timing = false
  self:_wake_at(self.runtime.now() + LOOK_AGAIN)
  error(err, 0)
end

local function keep_time(self)
  local now = self.runtime.now
  while not self._closed and self._wake < huge do
    local left = self._wake - now()
    if left > 0 then
      self._alarm:wait(left)
    else
      self._wake = huge
      local whole, next_time = protect(tend, self)
      if not whole then return hand_over(self, next_time) end
      self._wake = min(self._wake, next_time)
    end
  end
  self._timing = false
end

--- There is something to do at this time.
---@package
function Keeper:_wake_at(time)
  if not self._timing then
    self.runtime.spawn(keep_time, self) -- may throw; it begins with the next turn
    self._timing, self._wake = true, time
  elseif time < self._wake then
    self._wake = time
    self._alarm:signal()
  end
end

return Keeper
