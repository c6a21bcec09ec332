--- Nodes that failed are left alone for a while, which grows with each failure in a row. Knows no clock: `now` is
-- passed in.
-- @module moonrabbit.cluster.quarantine

local options = require "moonrabbit.options"

---@class moonrabbit.QuarantineOptions
---@field first number?   seconds after the first failure; 1 by default
---@field factor number?  by which each is longer than the one before; 2 by default
---@field max number?     seconds; 60 by default
---@field stable number?  seconds that a connection must last for the failures before it to be forgotten; 10 by default

---@class moonrabbit.cluster.Quarantine
local Quarantine = {}
Quarantine.__index = Quarantine

--- What the option `quarantine` may say.
Quarantine.options = {
  first = options.seconds, factor = options.number(1), max = options.seconds, stable = options.seconds,
}

--- An empty one.
---@package
---@param opts moonrabbit.QuarantineOptions?
---@return moonrabbit.cluster.Quarantine
function Quarantine.new(opts)
  opts = opts or {}
  return setmetatable({
    first = opts.first or 1, factor = opts.factor or 2, max = opts.max or 60, stable = opts.stable or 10,
    entries = {}, -- key -> { failures, ends, since: when it took us }
  }, Quarantine)
end

local function entry_of(self, key)
  local entry = self.entries[key]
  if not entry then
    entry = { failures = 0, ends = 0 }
    self.entries[key] = entry
  end
  return entry
end

--- It could not be connected to.
---@package
---@return number seconds that it is left alone
function Quarantine:failed(key, now)
  local entry = entry_of(self, key)
  entry.failures = entry.failures + 1
  entry.since = nil
  local time = self.first == 0 and 0 or math.min(self.max, self.first * self.factor ^ (entry.failures - 1))
  entry.ends = now + time
  return time
end

--- It took us.
---@package
function Quarantine:connected(key, now)
  local entry = entry_of(self, key)
  entry.since, entry.ends = now, now
end

--- The connection to it ended: as a failure, and the first one when it had lasted.
---@package
---@return number seconds
function Quarantine:lost(key, now)
  local entry = entry_of(self, key)
  if entry.since and now - entry.since >= self.stable then entry.failures = 0 end
  return self:failed(key, now)
end

--- Seconds that are left of its quarantine; 0: none.
---@package
---@return number
function Quarantine:left(key, now)
  local entry = self.entries[key]
  return entry and math.max(0, entry.ends - now) or 0
end

--- Forgets what is not in `keys`.
---@package
---@param keys table<string, any>
function Quarantine:keep(keys)
  for key in pairs(self.entries) do
    if not keys[key] then self.entries[key] = nil end
  end
end

return Quarantine
