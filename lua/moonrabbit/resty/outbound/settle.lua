--- What the broker has settled leaves the queue.
-- @module moonrabbit.resty.outbound.settle

local core = require "moonrabbit.core"
local life = require "moonrabbit.resty.life"
local queue = require "moonrabbit.resty.outbound.queue"

local core_acked, core_outcome, core_take_acked = core.acked, core.outcome, core.take_acked
local advance, finish = queue.advance, queue.finish

-- Messages before the first unsettled ones that are looked at for each batch of confirms.
local SCAN = 256

-- Takes off the front what is acked and nobody waits for: mostly all there is.
local function take_front(self)
  local head, slots, routes, confirmations = self.head, self.slots, self.routes, self.confirmations
  local past, bytes = core_take_acked(confirmations, self.kept, head + 1, self.next, slots)
  past = past - 1 -- what has index i here has number i + 1 there
  if past == head then return end
  for index = head, past - 1 do
    local slot = index % slots + 1
    routes[slot], confirmations[slot] = false, false
  end
  local n = past - head
  self.count, self.bytes = self.count - n, self.bytes - bytes
  self.confirmed, self.in_flight = self.confirmed + n, self.in_flight - n
  advance(self, past)
  if self.metrics then self.metrics:touch() end
end

--- Takes out what is settled, looking past `limit` messages that are not. Returns whether it has seen all.
local function settle(self, limit)
  take_front(self)
  local slots, confirmations = self.slots, self.confirmations
  local index, pending = self.head, 0
  while index < self.next do
    local confirmation = confirmations[index % slots + 1]
    if confirmation then
      local acked = core_acked(confirmation)
      if acked then
        finish(self, index, true)
      elseif acked == nil and core_outcome(confirmation) ~= "lost" then
        finish(self, index, nil, self.channel:_failure(confirmation))
      else
        pending = pending + 1
        if pending >= limit then return false end
      end
    end
    index = index + 1
  end
  return true
end

--- Called by the reader when the broker has settled something; must not yield.
local function noticed(self)
  life.look()
  if not settle(self, SCAN) then self.sweep_due = true end
  if self.sweep_due or self.next < self.suspects or life.exiting then self:rouse() end
end

return { settle = settle, noticed = noticed }
