--- Chance, for all that needs some: jitter, shuffled endpoints, canaries, names that nobody else gives.
--
-- `math.random` gives every process of Lua 5.1 to 5.3 the same numbers unless it was seeded, which is the program's own
-- affair. These are seeded by the system, and anew in a process that was forked: no two workers of nginx share a
-- sequence, whatever was loaded before they began. Good enough to spread clients and to tell names apart; for keys and
-- passwords take something else.
-- @module moonrabbit.random

local core = require "moonrabbit.core"

local random = {}

--- A number, 0 <= x < 1.
---@type fun(): number
random.number = core.random

--- Bytes of the system's.
---@type fun(n: integer): string   n: 1 to 256
random.bytes = core.random_bytes

--- Random digits.
---@param n integer bytes, 1 to 256: two digits each
---@return string
function random.hex(n)
  return (core.random_bytes(n):gsub(".", function(c) return ("%02x"):format(c:byte()) end))
end

--- A random whole number below 2^48, which every Lua holds exactly.
---@return number
function random.integer()
  local bytes, number = core.random_bytes(6), 0
  for i = 1, 6 do number = number * 256 + bytes:byte(i) end
  return number
end

--- Puts a list into random order.
---@param list any[]
---@param draw (fun(): number)?  random.number by default
---@return any[] list
function random.shuffle(list, draw)
  draw = draw or random.number
  for i = #list, 2, -1 do
    local j = math.floor(draw() * i) + 1
    list[i], list[j] = list[j], list[i]
  end
  return list
end

return random
