--- Jitter: spreads the retries of messages that failed together.
-- @module moonrabbit.app.retry.jitter

local jitter = {}

-- Lua 5.1 to 5.3 give every process the same numbers unless somebody seeds them, and processes that retry in
-- step are what jitter is against. So the numbers are our own: Park and Miller's, from a seed that the address
-- of a table (random by the system), the time and the clock make.
local state

local function seed()
  local address = tonumber((tostring({}):match "0x(%x+)" or "1"):sub(-7), 16) or 1
  local mixed = (address * 31 + os.time() * 7919 + os.clock() * 1e6) % 2147483646
  return math.floor(mixed) + 1
end

--- A number, 0 <= x < 1.
---@return number
function jitter.random()
  state = (state or seed()) * 16807 % 2147483647
  return (state - 1) / 2147483646
end

--- What is wrong with a value of the option `jitter`, or nil.
function jitter.valid(value)
  if value == "full" or value == "equal" or value == "none" then return end
  if type(value) == "number" and value >= 0 and value <= 1 then return end
  return '"full", "equal", "none" or a number from 0 to 1'
end

--- The least and the most that a delay can become.
function jitter.range(kind, delay)
  if kind == "full" then return 0, delay end
  if kind == "equal" then return delay / 2, delay end
  local share = kind == "none" and 0 or kind
  return delay * (1 - share), delay * (1 + share)
end

--- A delay with jitter.
function jitter.apply(kind, delay, random)
  if kind == "none" then return delay end
  local low, high = jitter.range(kind, delay)
  return low + (high - low) * random()
end

return jitter
