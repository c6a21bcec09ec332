--- order.lua as it is once somebody has understood the dead letters: old tills write 12,50 and mean 1250 cents.
local json = require "cjson.safe"

local order = {}

-- What a till means by its price, in cents.
local function cents(price)
  local whole, rest = tostring(price):match "^(%d+),(%d%d)$"
  if whole then return tonumber(whole) * 100 + tonumber(rest) end
end

--- The order, or nil and what is wrong with it.
function order.read(text)
  local placed, problem = json.decode(text)
  if type(placed) ~= "table" then return nil, "no order: " .. tostring(problem) end
  if type(placed.cents) ~= "number" then placed.cents = cents(placed.cents) end
  if placed.cents then return placed end
  return nil, ("order %s: nobody knows what it costs"):format(tostring(placed.id))
end

order.write = json.encode

return order
