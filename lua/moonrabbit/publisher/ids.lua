--- Message ids: a prefix that no other publisher has, in this process or another, and the message's number.
-- @module moonrabbit.publisher.ids

local ids = {}

--- What stands in a route where core stamps the number.
ids.ROOM = ("0"):rep(12)

local made = 0

-- Eight bytes that nobody else gets. Where there is no /dev/urandom: time, CPU time, an address and a count.
local function random()
  local file = io.open("/dev/urandom", "rb")
  local bytes = file and file:read(8)
  if file then file:close() end
  if bytes and #bytes == 8 then return bytes end
  local seed = table.concat({ os.time(), os.clock(), tostring({}), tostring(random), made }, " ")
  local a, b = 5381, 52711
  for i = 1, #seed do
    a = (a * 33 + seed:byte(i)) % 4294967296
    b = (b * 65599 + seed:byte(i)) % 4294967296
  end
  local out = {}
  for i = 0, 3 do
    out[i + 1] = string.char(math.floor(a / 256 ^ i) % 256)
    out[i + 5] = string.char(math.floor(b / 256 ^ i) % 256)
  end
  return table.concat(out)
end

--- A new prefix: 17 bytes.
---@return string
function ids.prefix()
  made = made + 1
  return (random():gsub(".", function(c) return ("%02x"):format(c:byte()) end)) .. "-"
end

--- The digits of a number, as core stamps them.
---@param n integer
---@return string
function ids.stamp(n)
  return ("%06x%06x"):format(math.floor(n / 16777216) % 16777216, n % 16777216)
end

return ids
