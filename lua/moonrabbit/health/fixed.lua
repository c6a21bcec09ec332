--- fixed: nothing heard for a multiple of the heartbeat interval.
-- @module moonrabbit.health.fixed

local Fixed = {}
Fixed.__index = Fixed

function Fixed.new(detector, opts)
  local multiple = opts.multiple or 2
  return setmetatable({ multiple = multiple, limit = multiple * detector.interval }, Fixed)
end

function Fixed:check(detector, now)
  local silence = now - detector.heard_at
  if silence < self.limit then return nil end
  return ("nothing heard from the broker for %.1f s, %g heartbeat intervals (fixed)"):format(silence, self.multiple)
end

function Fixed:due(detector) return detector.heard_at + self.limit end

return Fixed
