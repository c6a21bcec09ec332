--- A sliding window over runs: how many, how many failed, and how long they took.
--
-- It is made of ten slices, of which the oldest drops out as time goes on. Times are counted in buckets
-- that are 19 % wide, so a quantile is that exact.
-- @module moonrabbit.app.route.window

local floor, log = math.floor, math.log

local SLICES = 10
local PER_DOUBLING = 4
local FASTEST = 1e-6 -- seconds; anything faster is as fast
local SCALE = PER_DOUBLING / log(2)

---@class moonrabbit.app.Window
---@field count integer
---@field failures integer
local Window = {}
Window.__index = Window

---@param seconds number how far it reaches back
---@return moonrabbit.app.Window
function Window.new(seconds)
  return setmetatable({ length = seconds / SLICES, slices = {}, count = 0, failures = 0, times = {} }, Window)
end

local function bucket_of(seconds)
  return seconds <= FASTEST and 0 or floor(log(seconds / FASTEST) * SCALE)
end

local function drop(self, slice)
  self.count = self.count - slice.count
  self.failures = self.failures - slice.failures
  for bucket, n in pairs(slice.times) do
    local left = self.times[bucket] - n
    self.times[bucket] = left > 0 and left or nil
  end
end

--- Lets go of what is too old.
---@param now number
function Window:advance(now)
  local slices, oldest = self.slices, floor(now / self.length) - SLICES
  while slices[1] and slices[1].at <= oldest do drop(self, table.remove(slices, 1)) end
end

---@param ok boolean
---@param seconds number
---@param now number
function Window:add(ok, seconds, now)
  self:advance(now)
  local slices, at = self.slices, floor(now / self.length)
  local slice = slices[#slices]
  if not slice or slice.at < at then
    slice = { at = at, count = 0, failures = 0, times = {} }
    slices[#slices + 1] = slice
  end
  slice.count, self.count = slice.count + 1, self.count + 1
  if not ok then slice.failures, self.failures = slice.failures + 1, self.failures + 1 end
  local bucket = bucket_of(seconds)
  slice.times[bucket] = (slice.times[bucket] or 0) + 1
  self.times[bucket] = (self.times[bucket] or 0) + 1
end

--- The share that failed; 0 of none.
---@return number
function Window:error_rate()
  return self.count > 0 and self.failures / self.count or 0
end

--- The time that a share of the runs took at most; 0 of none.
---@param share number 0.95
---@return number seconds
function Window:quantile(share)
  local buckets, seen = {}, 0
  for bucket in pairs(self.times) do buckets[#buckets + 1] = bucket end
  table.sort(buckets)
  for _, bucket in ipairs(buckets) do
    seen = seen + self.times[bucket]
    if seen >= share * self.count then return FASTEST * 2 ^ ((bucket + 1) / PER_DOUBLING) end
  end
  return 0
end

return Window
