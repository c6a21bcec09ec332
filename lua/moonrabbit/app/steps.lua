--- The delays that a ladder has: round numbers, each at most 10 % more than the one before.
-- @module moonrabbit.app.steps

local steps = {}

--- The longest: the longest round one that `x-message-ttl` can say (46 days).
steps.LONGEST = 4000000

-- The numbers from 1.00 to 9.50, in hundredths.
local mantissas = {}
local function add(from, to, by)
  for n = from, to, by do mantissas[#mantissas + 1] = n end
end
add(100, 190, 10)
add(200, 380, 20)
add(400, 460, 30)
add(500, 950, 50)

-- Milliseconds of the shortest step, and so of the first decade.
local SHORTEST = 100

-- Seconds as milliseconds, upwards; what is only a rounding error of a float does not count.
local function milliseconds(delay)
  return math.ceil(delay * 1000 - 1e-6)
end

local to_integer = rawget(math, "tointeger")

local function integer(n)
  return to_integer and to_integer(n) or n
end

--- The shortest step that is not shorter than a delay; nil when there is none.
---@param delay number seconds
---@return integer? milliseconds
function steps.of(delay)
  if delay > steps.LONGEST then return nil end
  local ms = math.max(milliseconds(delay), SHORTEST)
  local unit = SHORTEST / 100
  while unit * 1000 <= ms do unit = unit * 10 end
  for _, n in ipairs(mantissas) do
    if n * unit >= ms then return integer(n * unit) end
  end
  return integer(1000 * unit)
end

--- The same of a list of delays, the shortest first.
---@param list number[] seconds
---@param delay number
---@return integer? milliseconds
function steps.of_list(list, delay)
  for _, seconds in ipairs(list) do
    if milliseconds(seconds) >= milliseconds(delay) then return integer(milliseconds(seconds)) end
  end
end

--- A step in a word: "5s", "1500ms".
---@param step integer milliseconds
---@return string
function steps.text(step)
  if step % 1000 == 0 then return ("%.0fs"):format(step / 1000) end
  return ("%.0fms"):format(step)
end

return steps
