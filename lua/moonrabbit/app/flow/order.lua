--- Order by key: messages of one key are handled one at a time, in the order in which they came; those of other
-- keys meanwhile. A key in use has a lane, in which its messages wait; the task that handles the first of them
-- handles them all.
-- @module moonrabbit.app.flow.order

local text_of = require "moonrabbit.app.failure".text

---@class moonrabbit.app.Order
local Order = {}
Order.__index = Order

---@param order_by fun(message: moonrabbit.Message): any must not wait
---@return moonrabbit.app.Order
function Order.new(order_by)
  return setmetatable({ order_by = order_by, lanes = {}, spare = {} }, Order)
end

local function lane_for(self)
  local spare = self.spare
  local lane = spare[#spare]
  if lane then
    spare[#spare] = nil
    return lane
  end
  return { first = 1, last = 0 }
end

--- Handles a message by handle(runner, message, waited), now or after those before it.
---@param runner table
---@param message moonrabbit.Message
---@param handle fun(runner: table, message: moonrabbit.Message, waited: boolean)
function Order:handle(runner, message, handle)
  local ok, key = pcall(self.order_by, message)
  if not ok then return handle(runner, message, false, "order_by: " .. text_of(key)) end
  if key ~= key then return handle(runner, message, false, "order_by: the key is not a number (NaN)") end
  if key == nil then return handle(runner, message, false) end
  local lanes = self.lanes
  local lane = lanes[key]
  if lane then
    lane.last = lane.last + 1
    lane[lane.last] = message
    return
  end
  lane = lane_for(self)
  lanes[key] = lane
  handle(runner, message, false)
  while lane.first <= lane.last do
    message = lane[lane.first]
    lane[lane.first] = nil
    lane.first = lane.first + 1
    handle(runner, message, true)
  end
  lane.first, lane.last = 1, 0
  lanes[key] = nil
  if #self.spare < 64 then self.spare[#self.spare + 1] = lane end
end

return Order
