--- adaptive: an answer, or a gap between frames, far outside of what the last ones took.
-- @module moonrabbit.health.adaptive

local Window = require "moonrabbit.health.window"

local Adaptive = {}
Adaptive.__index = Adaptive

local max = math.max

-- With fewer samples than this a mean says little.
local ENOUGH = 5

function Adaptive.new(detector, opts)
  local size, quarter = opts.window or 100, detector.interval < math.huge and detector.interval / 4 or detector.period
  return setmetatable({
    deviations = opts.deviations or 6,
    least = opts.least or max(1, quarter),
    unknown = 2 * quarter, -- seconds that an answer may take until enough are known
    trips = Window.new(size),
    gaps = Window.new(size),
  }, Adaptive)
end

function Adaptive:gap(seconds) self.gaps:add(seconds) end
function Adaptive:answered(seconds) self.trips:add(seconds) end

-- Seconds that the next one may take.
function Adaptive:bound(window, least, unknown)
  if window.count < ENOUGH then return max(least, unknown) end
  local mean, deviation = window:moments()
  return max(least, mean + self.deviations * deviation)
end

function Adaptive:limits(detector)
  if detector.asked_at then return detector.asked_at, self:bound(self.trips, self.least, self.unknown) end
  -- The broker may be silent for a whole interval: it looks every half of one whether it has sent anything.
  return detector.heard_at, self:bound(self.gaps, detector.interval, 2 * detector.interval)
end

local function compared(window, what)
  local mean, deviation = window:moments()
  return ("the last %d %s took %.3g s, give or take %.3g s"):format(window.count, what, mean, deviation)
end

function Adaptive:check(detector, now)
  local since, limit = self:limits(detector)
  local waited = now - since
  if waited < limit then return nil end
  if detector.asked_at then
    return ("the broker was asked %.1f s ago, and nothing came: %s (adaptive)"):format(waited,
      compared(self.trips, "answers"))
  end
  return ("nothing heard from the broker for %.1f s: %s (adaptive)"):format(waited, compared(self.gaps, "gaps"))
end

function Adaptive:due(detector)
  local since, limit = self:limits(detector)
  return since + limit
end

return Adaptive
