--- What a publisher has accepted and not yet seen settled, by number: 1 is its first message.
--
-- Two rings in plain arrays: a message costs two stores, and no table of its own. `kept` holds the body of a
-- message of the publisher's own route, else a record (`body`, `exchange`, `routing_key`, `mandatory`, `props`
-- and what happened to it), or `false` once it is settled; `confirmations` its Confirmation. They start at the
-- oldest that is not, and only there do they shrink: what is settled out of turn keeps its place until then.
-- @module moonrabbit.publisher.ring

local core = require "moonrabbit.core"

local take_acked, acked = core.take_acked, core.acked

---@class moonrabbit.publisher.Ring
---@field first integer the oldest number that is not settled; last + 1 when there is none
---@field last integer  the newest number
---@field size integer  places, a power of two; number n has place (n - 1) % size + 1
---@field bytes integer of the bodies of those from first to last
local Ring = {}
Ring.__index = Ring

local FIRST_SIZE = 64

local function places(n)
  local list = {}
  for i = 1, n do list[i] = false end
  return list
end

function Ring.new()
  return setmetatable({
    first = 1, last = 0, size = FIRST_SIZE, bytes = 0,
    kept = places(FIRST_SIZE), confirmations = places(FIRST_SIZE),
  }, Ring)
end

--- How many numbers there are from the oldest unsettled one on.
function Ring:count() return self.last - self.first + 1 end

--- Makes room for one more.
function Ring:reserve()
  local size = self.size
  if self.last - self.first + 1 < size then return end
  local kept, confirmations = places(2 * size), places(2 * size)
  for n = self.first, self.last do
    local from, to = (n - 1) % size + 1, (n - 1) % (2 * size) + 1
    kept[to], confirmations[to] = self.kept[from], self.confirmations[from]
  end
  self.kept, self.confirmations, self.size = kept, confirmations, 2 * size
end

--- Adds a message, for which `reserve` has made room; its number.
function Ring:add(message, confirmation)
  local n = self.last + 1
  local at = (n - 1) % self.size + 1
  self.kept[at], self.confirmations[at] = message, confirmation
  self.last = n
  self.bytes = self.bytes + #(type(message) == "string" and message or message.body)
  return n
end

--- What is kept of a number, and its confirmation; false when it is settled.
function Ring:at(n)
  if n < self.first or n > self.last then return false, false end
  local at = (n - 1) % self.size + 1
  return self.kept[at], self.confirmations[at]
end

--- The record of a number that is not settled, made where there was only a body.
function Ring:record(n)
  local at = (n - 1) % self.size + 1
  local message = self.kept[at]
  if type(message) == "string" then
    message = { body = message, number = n }
    self.kept[at] = message
  end
  return message
end

--- Settles a number, which keeps its place until those before it are settled.
function Ring:settle(n)
  local at = (n - 1) % self.size + 1
  local message = self.kept[at]
  if not message then return end
  self.bytes = self.bytes - #(type(message) == "string" and message or message.body)
  self.kept[at] = false
end

--- Takes off the front what is settled. `ended(record)` is called for acked messages that have one.
--- True when anything went.
function Ring:advance(ended)
  local before = self.first
  repeat
    local first, bytes = take_acked(self.confirmations, self.kept, self.first, self.last, self.size)
    self.first, self.bytes = first, self.bytes - bytes
    local going = false
    if first <= self.last then
      local message, confirmation = self:at(first)
      if not message then
        going = true
      elseif type(message) == "table" and acked(confirmation) then
        self:settle(first)
        ended(message)
        going = true
      end
      if going then self.first = first + 1 end
    end
  until not going
  return self.first > before
end

--- The numbers that are not settled, oldest first, as an array.
function Ring:unsettled()
  local list = {}
  for n = self.first, self.last do
    local message, confirmation = self:at(n)
    if message and not acked(confirmation) then list[#list + 1] = n end
  end
  return list
end

return Ring
