--- The reader of a session: a task that waits for bytes and pumps the engine's events.
--
-- A consumer without acks, or a listener, that is given more than it takes holds it up, so that memory is bounded;
-- but answers that somebody waits for lie behind what is held up, so for their sake some more is read.
-- @module moonrabbit.session

-- So much is read past what a full consumer may hold, for those who wait for an answer behind it.
local MOST_ADMITTED = 64 * 1024 * 1024

---@class moonrabbit.Session
local Session = {}

-- Whether listeners have so much to take that nothing more is to be read. A handshake and a goodbye go on.
local function is_overfull(self) return self.state == "open" and self.overfull() end

-- Counts what is read past a consumer or listener that has more than it takes.
local function count_read(self, n, overfull)
  self.admitted = (overfull or self.engine:is_full()) and self.admitted + n or 0
end

--- Whether some more may be read past a full consumer.
---@return boolean
function Session:may_admit() return self.admitted < MOST_ADMITTED end

--- Reads once where the transport lets a caller without a loop do so; false: it does not, or not now.
---@param deadline number
---@return boolean
function Session:read_alone(deadline)
  local transport = self.transport
  if not transport.fill_alone or self.state == "closed" or is_overfull(self) then return false end
  local n, kind, text = transport:fill_alone(self.engine, deadline)
  if n then
    count_read(self, n, false)
  elseif kind == nil or kind == "again" or kind == "full" then
    return false
  else
    self.engine:eof(text or kind)
  end
  self:pump()
  return true
end

-- Reading waits for who has been given more than they take, unless somebody waits for an answer that only reading can
-- bring; then it answers true.
local function hold(self)
  local engine, now = self.engine, self.runtime.now
  if self.awaiting > 0 and self:may_admit() and now() < self.awaiting_until then
    engine:admit()
    self.runtime.sleep(0) -- what waits has its deadline, and consumers want their turn
    return true
  end
  local detector = self.detector
  engine:pause(true, now())
  if detector then detector:pause(true, now()) end
  self.paused = true
  self.drained:wait(1)
  self.paused = false
  if self.state ~= "closed" then engine:pause(false, now()) end
  if detector then detector:pause(false, now()) end
end

--- Its task.
function Session:read_loop()
  local engine, transport, now = self.engine, self.transport, self.runtime.now
  while self.state ~= "closed" do
    local overfull = is_overfull(self)
    while overfull and not hold(self) do overfull = is_overfull(self) end
    local n, kind, text = transport:fill(engine)
    if n then
      count_read(self, n, overfull)
      if self.detector then self.detector:heard(now()) end
    end
    if not n and kind ~= "full" then
      engine:eof(text or kind)
      n = 0
    end
    local events = self:pump()
    if not n and events == 0 and self.state ~= "closed" then hold(self) end
  end
end

--- A consumer or listener has taken what came: reading may go on.
function Session:drain()
  if self.paused then self.drained:signal() end
end

return Session
