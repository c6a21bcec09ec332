--- Settling deliveries where the handler may have done it itself: nothing throws.
--
-- A spec, or a test without a broker, gives the runner a table of its own with these functions.
-- @module moonrabbit.app.runner.settle

local core = require "moonrabbit.core"

local core_ack, core_settle, core_outstanding = core.ack, core.settle, core.outstanding

local settle = {}

local function ack(message)
  local flush, owner = core_ack(message)
  if flush == nil then return nil, owner end
  local session = owner._session
  if flush then session:try_flush() else session:touch() end
  return true
end

--- Acks. nil, "settled": somebody did; nil, "closed": its channel has gone, and the broker delivers it again.
---@param message moonrabbit.Message
---@return true|nil, string? why
settle.ack = core.acker(ack, function(owner) owner._session:try_flush() end)

--- Gives it back to its queue. kind: "nack", or "reject", which counts toward a delivery limit.
---@param message moonrabbit.Message
---@param kind "nack"|"reject"
---@return true|nil, string? why
function settle.back(message, kind)
  local flush, owner = core_settle(message, kind, true)
  if flush == nil then return nil, owner end
  if flush then owner._session:try_flush() else owner._session:touch() end
  return true
end

--- Rejects it: it is dead-lettered by the broker, or dropped, as its queue says.
---@param message moonrabbit.Message
---@return true|nil, string? why
function settle.reject(message)
  local flush, owner = core_settle(message, "reject", false)
  if flush == nil then return nil, owner end
  owner._session:touch()
  return true
end

--- Whether it is still to be settled. nil, "settled" or "closed", as for ack.
---@param message moonrabbit.Message
---@return true|nil, string? why
function settle.outstanding(message)
  return core_outstanding(message)
end

return settle
