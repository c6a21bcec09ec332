--- Random numbers of our own: `math.random` gives every process of Lua 5.1 to 5.3 the same ones unless it was
-- seeded, and seeding it is the program's affair. Good enough to spread clients, and for nothing else.
-- @module moonrabbit.cluster.random

local random = {}

local MODULUS = 2147483647 -- Park and Miller's generator: products stay below 2^53

-- What differs between processes that start in the same second: the address of a fresh table.
local function seed()
  local address = tonumber(tostring({}):match "0x(%x+)" or "1", 16) or 1
  local clock = os.clock() * 1000003
  return math.floor(address / 16 + os.time() * 7919 + clock) % (MODULUS - 1) + 1
end

--- A function that returns numbers from 0 to below 1.
---@param start integer? a seed, for specs
---@return fun(): number
function random.new(start)
  local state = start or seed()
  return function()
    state = state * 48271 % MODULUS
    return (state - 1) / (MODULUS - 1)
  end
end

--- Puts a list into random order.
---@param list any[]
---@param draw fun(): number
---@return any[] list
function random.shuffle(list, draw)
  for i = #list, 2, -1 do
    local j = math.floor(draw() * i) + 1
    list[i], list[j] = list[j], list[i]
  end
  return list
end

return random
