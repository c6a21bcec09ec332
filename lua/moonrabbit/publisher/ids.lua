--- Message ids: a prefix that no other publisher has, in this process or another, and the message's number.
-- @module moonrabbit.publisher.ids

local random = require "moonrabbit.random"

local ids = {}

--- What stands in a route where core stamps the number.
ids.ROOM = ("0"):rep(12)

--- A new prefix: 17 bytes.
---@return string
function ids.prefix() return random.hex(8) .. "-" end

--- The digits of a number, as core stamps them.
---@param n integer
---@return string
function ids.stamp(n)
  return ("%06x%06x"):format(math.floor(n / 16777216) % 16777216, n % 16777216)
end

return ids
