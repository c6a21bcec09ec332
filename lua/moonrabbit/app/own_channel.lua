--- A channel for a moment: what is done on it may end it, and nobody else's.
-- @module moonrabbit.app.own_channel

local protect = require "moonrabbit.protect"

--- Calls fn(channel, …) with a channel of its own, which is closed then, also when that throws, or its task is cancelled.
---@param connection moonrabbit.Connection
---@param fn fun(channel: moonrabbit.Channel, ...: any): any, any, any
---@return any ...  what fn returns; nil, err without a channel
local function own_channel(connection, fn, ...)
  local channel, err = connection:channel()
  if not channel then return nil, err end
  local whole, first, second, third = protect(fn, channel, ...)
  if channel:is_open() then channel:close() end
  if not whole then error(first, 0) end
  return first, second, third
end

return own_channel
