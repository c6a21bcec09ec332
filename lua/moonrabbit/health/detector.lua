--- What a session knows of its broker's signs of life, and whether that is suspicious. Pure: no clock, no
-- socket. The strategies are in files of their own and see this object as their memory.
-- @module moonrabbit.health.detector

---@class moonrabbit.health.Suspicion
---@field strategy string
---@field text string   one sentence

---@class moonrabbit.health.Detector
---@field strategy string
---@field interval number       seconds of a heartbeat interval; math.huge where there are no heartbeats
---@field probe number|false    seconds of silence after which the broker is asked
---@field period number         seconds between two looks
---@field heard_at number       the last sign of life
---@field asked_at number|false since when a question is open that nothing has come after
local Detector = {}
Detector.__index = Detector

local max, min, huge = math.max, math.min, math.huge

-- A look that comes so much too late was held up by this process.
local TOLERANCE = 0.05

local judges = {
  fixed = "moonrabbit.health.fixed",
  adaptive = "moonrabbit.health.adaptive",
  consecutive = "moonrabbit.health.consecutive",
}

--- Used by moonrabbit.health.
---@param opts moonrabbit.HealthOptions
---@param heartbeat number seconds; 0: none
---@param now number
---@return moonrabbit.health.Detector
function Detector.new(opts, heartbeat, now)
  local strategy = opts.strategy or "adaptive"
  local interval = heartbeat > 0 and heartbeat or huge
  local probe = opts.probe
  if probe == nil then probe = strategy ~= "fixed" and interval / 4 end
  local self = setmetatable({
    strategy = strategy, interval = interval, probe = probe, period = probe or interval / 4,
    heard_at = now, asked_at = false, pending = false, paused = false, looks_at = false,
    news = true,        -- something came since the strategy last looked
    resumed_at = now,   -- the last time that this process stood still, or reading was paused, ended
  }, Detector)
  self.judge = require(judges[strategy]).new(self, opts)
  return self
end

--- Bytes came.
---@param now number
function Detector:heard(now)
  local gap = now - self.heard_at
  self.heard_at, self.news = now, true
  if gap > self.period and self.judge.gap and not self.asked_at then self.judge:gap(gap) end
  self.asked_at = false
end

--- A probe was handed to the connection.
---@param now number
function Detector:probe_sent(now)
  self.asked_at, self.pending = now, true
end

--- A probe was answered, after so many seconds.
---@param now number
---@param round_trip number
function Detector:probed(now, round_trip)
  self.pending = false
  -- Where the clock ran while this process did not, it says nothing about the broker.
  if self.judge.answered and now - round_trip >= self.resumed_at then self.judge:answered(round_trip) end
end

--- Reading is paused, or goes on: what is not read cannot be held against the broker.
---@param paused boolean
---@param now number
function Detector:pause(paused, now)
  self.paused = paused
  if not paused then self:excuse(now, huge) end
end

-- So many seconds, until now, do not count.
function Detector:excuse(now, seconds)
  self.heard_at = min(now, self.heard_at + seconds)
  if self.asked_at then self.asked_at = min(now, self.asked_at + seconds) end
  self.resumed_at = now
end

--- Whether the broker is to be asked now. Not where it cannot answer: see health/watch.lua.
---@param now number
---@return boolean
function Detector:wants_probe(now)
  return self.probe and not self.pending and not self.paused and now - self.heard_at >= self.probe or false
end

--- Since when the broker owes us a sign of life; nil when it owes none.
---@param now number
---@return number?
function Detector:owing_since(now)
  if self.asked_at then return self.asked_at end
  local due = self.heard_at + self.interval
  if now >= due then return due end
end

--- Looks: nil, or why the broker is suspect. To be called when `next_check` said. A suspicion holds only if it
--- is found again after the socket was read once more: this process may have been late to read.
---@param now number
---@return moonrabbit.health.Suspicion?
function Detector:check(now)
  local at = self.looks_at
  self.looks_at = false
  if self.paused then return nil end
  if at and now - at > max(TOLERANCE, self.period / 4) then self:excuse(now, now - at) end
  local text = self.judge:check(self, now)
  if text then return { strategy = self.strategy, text = text } end
end

--- When `check` and `wants_probe` want to be asked next.
---@param now number
---@return number
function Detector:next_check(now)
  local at = now + self.period
  if not self.paused then
    at = min(at, self.judge:due(self))
    if self.probe and not self.pending then
      local ask_at = self.heard_at + self.probe
      at = min(at, ask_at > now and ask_at or now + self.period / 4) -- it could not be asked just now
    end
    at = max(at, now + 0.001)
  end
  self.looks_at = at
  return at
end

return Detector
