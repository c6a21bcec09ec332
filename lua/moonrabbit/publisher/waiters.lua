--- Who waits for which confirmation of a publisher, over all its channels.
--
-- Confirms mostly come in the order of the publishes, so mostly the first few waiters are whom a batch of them
-- wakes: each batch looks at those and at a few more, and a sweep a moment later at all of them.
-- @module moonrabbit.publisher.waiters

local core = require "moonrabbit.core"

local acked = core.acked
local huge = math.huge

-- Waiters beyond the first unsettled one that are looked at for each batch of confirms.
local SCAN = 256
local SWEEP = 0.005

---@class moonrabbit.publisher.Waiters
---@field count integer
local Waiters = {}
Waiters.__index = Waiters

function Waiters.new(runtime)
  return setmetatable({ count = 0, _runtime = runtime, _of = {}, _order = {}, _head = 1, _tail = 0 }, Waiters)
end

--- Joins those who wait for a confirmation: a waiter, with a `condition` to wait on. `own`: its failure is
--- told to nobody else.
function Waiters:join(confirmation, own)
  local waiter = self._of[confirmation]
  if not waiter then
    if self.count == 0 then self._head, self._tail = 1, 0 end
    self._tail = self._tail + 1
    waiter = {
      condition = self._runtime.condition(), confirmation = confirmation, index = self._tail, own = own, users = 0,
    }
    self._order[waiter.index], self._of[confirmation] = waiter, waiter
    self.count = self.count + 1
  end
  waiter.users = waiter.users + 1
  return waiter
end

--- Joins them for good: for whoever cannot say when they wait no longer.
function Waiters:stay(confirmation)
  local waiter = self:join(confirmation, false)
  if waiter.stays then waiter.users = waiter.users - 1 end
  waiter.stays = true
  return waiter
end

local function drop(self, waiter)
  if self._of[waiter.confirmation] ~= waiter then return end
  self._of[waiter.confirmation] = nil
  self._order[waiter.index] = false
  self.count = self.count - 1
end

--- Waits no longer.
function Waiters:leave(waiter)
  waiter.users = waiter.users - 1
  if waiter.users == 0 then drop(self, waiter) end
end

--- Wakes who waits for a confirmation; whether its failure is theirs alone.
function Waiters:settled(confirmation)
  local waiter = self._of[confirmation]
  if not waiter then return false end
  drop(self, waiter)
  waiter.condition:broadcast()
  return waiter.own
end

-- Wakes those whose confirmation is settled, until `limit` others were met; whether all were looked at.
local function wake(self, limit)
  local order, leading, unsettled = self._order, true, 0
  for i = self._head, self._tail do
    local waiter = order[i]
    if waiter and acked(waiter.confirmation) ~= false then
      self:settled(waiter.confirmation)
      waiter = false
    end
    if waiter then
      leading = false
      unsettled = unsettled + 1
      if unsettled >= limit then return false end
    elseif leading then
      order[i] = nil
      self._head = i + 1
    end
  end
  return true
end

--- Wakes whose confirmation is settled.
function Waiters:wake()
  if self.count == 0 or wake(self, SCAN) or self._sweeping then return end
  self._sweeping = true
  self._runtime.spawn(function()
    self._runtime.sleep(SWEEP)
    self._sweeping = false
    wake(self, huge)
  end)
end

return Waiters
