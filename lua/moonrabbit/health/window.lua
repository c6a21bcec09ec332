--- A sliding window of samples: the last so many, their mean and standard deviation.
-- @module moonrabbit.health.window

---@class moonrabbit.health.Window
---@field count integer  samples in it
local Window = {}
Window.__index = Window

---@param size integer
---@return moonrabbit.health.Window
function Window.new(size)
  return setmetatable({ size = size, count = 0, at = 0, known = 0, mean = 0, deviation = 0 }, Window)
end

---@param sample number
function Window:add(sample)
  self.at = self.at % self.size + 1
  self[self.at] = sample
  if self.count < self.size then self.count = self.count + 1 end
  self.known = false
end

--- Worked out anew from all samples, so that no error of rounding gathers.
---@return number mean, number deviation
function Window:moments()
  if self.known then return self.mean, self.deviation end
  local sum, squares, count = 0, 0, self.count
  for i = 1, count do sum = sum + self[i] end
  local mean = count > 0 and sum / count or 0
  for i = 1, count do squares = squares + (self[i] - mean) ^ 2 end
  self.mean, self.deviation = mean, count > 0 and math.sqrt(squares / count) or 0
  self.known = true
  return self.mean, self.deviation
end

return Window
