--- Numbers as the text format of Prometheus has them: exact, and as short as that allows.
-- @module moonrabbit.metrics.numbers

local floor, huge = math.floor, math.huge
local math_type = rawget(math, "type")

local numbers = {}

--- A number as text, such that reading it gives the same number.
---@param n number
---@return string
function numbers.write(n)
  if math_type and math_type(n) == "integer" then return tostring(n) end
  if n ~= n then return "NaN" end
  if n == huge then return "+Inf" end
  if n == -huge then return "-Inf" end
  if n == floor(n) and n > -2 ^ 53 and n < 2 ^ 53 then return ("%.0f"):format(n) end
  local short = ("%.15g"):format(n)
  if tonumber(short) == n then return short end
  return ("%.17g"):format(n)
end

local special = { NaN = 0 / 0, ["+Inf"] = huge, Inf = huge, ["-Inf"] = -huge }

--- The number of a text, or nil.
---@param text string
---@return number?
function numbers.read(text)
  return special[text] or tonumber(text)
end

return numbers
