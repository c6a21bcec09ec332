--- Names for claims that no other process makes too: math.random starts alike in every process of an older Lua.
-- @module moonrabbit.app.dedupe.random

local random = {}

--- Random bytes.
---@param n integer
---@return string
function random.bytes(n)
  local source = io.open("/dev/urandom", "rb")
  local bytes = source and source:read(n)
  if source then source:close() end
  if bytes then return bytes end
  local parts = {}
  math.randomseed(os.time() + math.floor(os.clock() * 1000000) + (tonumber(tostring(parts):match "0x(%x+)", 16) or 0))
  for i = 1, n do parts[i] = string.char(math.random(0, 255)) end
  return table.concat(parts)
end

--- A random whole number below 2^48, which every Lua holds exactly.
---@return number
function random.number()
  local bytes, number = random.bytes(6), 0
  for i = 1, 6 do number = number * 256 + bytes:byte(i) end
  return number
end

--- Random digits.
---@param n integer bytes
---@return string
function random.hex(n)
  return (random.bytes(n):gsub(".", function(c) return ("%02x"):format(c:byte()) end))
end

return random
