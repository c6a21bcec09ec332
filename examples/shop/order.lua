--- Orders as JSON: { "id": "000017", "customer": "…", "name": "…", "cents": 1250 }.
local json = require "cjson.safe"

local order = {}

--- The order, or nil and what is wrong with it.
function order.read(text)
  local placed, problem = json.decode(text)
  if type(placed) ~= "table" then return nil, "no order: " .. tostring(problem) end
  if type(placed.cents) ~= "number" then
    return nil, ("order %s: its cents are no number: '%s'"):format(tostring(placed.id), tostring(placed.cents))
  end
  return placed
end

order.write = json.encode

return order
