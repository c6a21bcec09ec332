--- consecutive: so many periods in a row in which nothing came, though it was owed.
--
-- Each period is counted when it is looked at, so time in which this process did not run is one miss at most.
-- @module moonrabbit.health.consecutive

local Consecutive = {}
Consecutive.__index = Consecutive

local max = math.max

function Consecutive.new(detector, opts)
  return setmetatable({ most = opts.misses or 3, misses = 0, began = detector.heard_at }, Consecutive)
end

-- When the period that is under way began.
local function began(self, detector)
  return max(self.began, detector.resumed_at, detector.asked_at or detector.heard_at + detector.interval)
end

function Consecutive:check(detector, now)
  if not detector:owing_since(now) then
    return nil
  end
  if detector.news then
    detector.news = false
    self.misses, self.began = 0, detector.heard_at
  end
  -- Rounding must not make it wait for another period.
  if now - began(self, detector) >= detector.period * 0.999 then
    self.misses, self.began = self.misses + 1, now
  end
  if self.misses < self.most then return nil end
  return ("nothing heard from the broker in %d periods of %.3g s in a row (consecutive)"):format(self.misses,
    detector.period)
end

function Consecutive:due(detector) return began(self, detector) + detector.period end

return Consecutive
