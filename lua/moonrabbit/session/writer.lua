--- The writer of a session: a task that sends what there is, once a turn of the loop, and keeps the engine's
-- deadlines, heartbeats among them. While it waits for a full socket, a second task, the watch, keeps them.
-- @module moonrabbit.session

local turns = require "moonrabbit.session.turns"

local max, min, huge = math.max, math.min, math.huge

-- After a write failed, what the broker said before is still read, for so long.
local LAST_WORDS = 1
-- Seconds between two looks at a peer that takes nothing, at least.
local SHORTEST_LOOK = 0.01
-- The loop was away for so many seconds, when a task wakes so much later than it wanted.
local LATE = 0.5

---@class moonrabbit.Session
local Session = {}

--- Something is to be written (or a deadline has changed): the writer runs at the next turn.
function Session:touch()
  if not self.dirty then
    self.dirty = true
    self.wake:signal()
  end
end

--- Writes what can be written at once; never yields.
function Session:try_flush()
  if not self.corked and not self.write_error then self.transport:try_flush(self.engine) end
  if self.engine:pending() > 0 then self:touch() end
end

--- Waits until everything written so far has left for the network, gathered acks too.
---@param timeout number
---@return true|nil, moonrabbit.Error?
function Session:flush(timeout)
  local now = self.runtime.now
  local deadline = now() + timeout
  for channel in pairs(self.channels) do channel._core:flush_acks() end
  self.corked = false
  if self.state ~= "closed" then self:try_flush() end
  while self.state ~= "closed" and self.engine:pending() > 0 do
    self:touch()
    local left = deadline - now()
    if left <= 0 then
      return nil, self:error("timeout", ("the broker did not take what is to be sent within %g s"):format(timeout))
    end
    self.flushed:wait(left < huge and left or nil)
  end
  if self.state == "closed" then return nil, self.reason end
  return true
end

-- ---- Its task ---------------------------------------------------------------------------------------

-- Writes everything. A write that has to wait is watched meanwhile; one that does not wakes nobody.
local function flush_all(self)
  local engine, transport = self.engine, self.transport
  if not transport.blind then
    local done, kind, text = transport:try_flush(engine)
    if kind ~= "again" then return done, kind, text end
    self.stuck:signal()
  end
  self.flushing = true
  local done, kind, text = transport:flush(engine)
  self.flushing = false
  return done, kind, text
end

local function write(self)
  self.dirty, self.corked = false, false
  if self.write_error then return end
  local ok, kind, text = flush_all(self)
  if ok then
    self.room:signal()
    self.flushed:broadcast()
  else
    -- The broker may have said why before it hung up: reading goes on for a moment.
    self.write_error = text or kind or "closed"
    self.write_error_at = self.runtime.now()
  end
end

-- Waits for something to write, until the engine wants its tick. False: writing has failed, and what the broker said
-- before has been read by now.
local function wait(self)
  local now = self.runtime.now
  local t = now()
  local deadline = self.engine:deadline(t)
  local left = deadline and max(0, deadline - t)
  if self.write_error then
    local rest = self.write_error_at + LAST_WORDS - t
    if rest <= 0 then return false end
    left = left and min(left, rest) or rest
  end
  if left and left <= 0 then return true end
  self.wake:wait(left)
  if not deadline or self.state == "closed" then return true end
  local by = now() - deadline
  if by > LATE then
    self.runtime.sleep(0) -- what the broker sent meanwhile must be read before its silence is judged
    turns.late(self, by)
  end
  return true
end

-- The engine's deadlines, and what it says to them.
local function tick(self)
  if self.state == "closed" then return end
  self.engine:tick(self.runtime.now())
  self:pump()
end

-- What is left when the session has ended leaves.
local function write_last(self)
  if not self.last_flush then return end
  self.transport:flush(self.engine)
  self.transport:close()
  self.last_flush = false
  self.left:broadcast()
end

--- The writer's task.
function Session:write_loop()
  while self.state ~= "closed" do
    write(self)
    if self.state == "closed" then break end
    if not self.dirty then
      if not wait(self) then
        self.engine:eof(self.write_error)
        self:pump()
        break
      end
      tick(self)
    end
  end
  self.ended:broadcast()
  self.stuck:broadcast()
  write_last(self)
end

-- ---- The watch --------------------------------------------------------------------------------------

--- The watch's task. A flush may wait for as long as the socket is full: a peer that takes nothing and says nothing is
--- noticed here, as soon as the writer would notice it. (The engine takes ticks that are further apart than three
--- quarters of an interval for a standstill of this process.) Until then nothing is to be done: where a transport cannot
--- tell that a write waits, what is looked for is a broker that has been silent for long.
function Session:watch_loop()
  local engine, now, quarter, look = self.engine, self.runtime.now, self.heartbeat / 4, self.runtime.look
  while self.state ~= "closed" do
    local silent_at, wait_for = engine:silence_deadline(), nil
    local left = silent_at and silent_at - now()
    if self.flushing then
      wait_for = left and min(quarter, max(SHORTEST_LOOK, left)) or quarter
    elseif self.transport.blind then
      wait_for = left and max(quarter, left - 2 * quarter) or quarter
    end
    self.stuck:wait(wait_for)
    if look then look() end
    if self.flushing and self.state ~= "closed" then
      local deadline = engine:deadline(now())
      if deadline and deadline <= now() then tick(self) end
    end
  end
end

return Session
