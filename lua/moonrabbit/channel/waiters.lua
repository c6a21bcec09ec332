--- Who waits for which confirmation, of a channel or of a publisher over all its channels.
--
-- Confirms mostly come in the order of the publishes, so mostly the first few waiters are whom a batch of them
-- wakes: each batch looks at those and at a few more, and a sweep a moment later at all of them.
-- @module moonrabbit.channel.waiters

local core = require "moonrabbit.core"

local acked = core.acked
local huge = math.huge

-- Waiters beyond the first unsettled one that are looked at for each batch of confirms.
local SCAN = 256
local SWEEP = 0.005
-- Waiters that are used again, at most.
local SPARE = 64
-- Places of waiters that are gone are taken out when there are so many more of them than waiters.
local GAPS = 64

---@class moonrabbit.channel.Waiters
---@field count integer
local Waiters = {}
Waiters.__index = Waiters

function Waiters.new(runtime)
  return setmetatable({
    count = 0, _runtime = runtime,
    _of = {},                          -- confirmation -> waiter
    _order = {}, _head = 1, _tail = 0, -- waiters as they came; false: gone
    _spare = {},
  }, Waiters)
end

-- Takes out the places of those who are gone: while somebody waits for long, they are not in front.
local function compact(self)
  local order, last = self._order, self._head - 1
  for i = self._head, self._tail do
    local waiter = order[i]
    order[i] = nil
    if waiter then
      last = last + 1
      order[last], waiter.index = waiter, last
    end
  end
  self._tail = last
end

--- Joins those who wait for a confirmation: a waiter, with a `condition` to wait on. `own`: its failure is
--- told to nobody else.
function Waiters:join(confirmation, own)
  local waiter = self._of[confirmation]
  if not waiter then
    if self.count == 0 then
      self._head, self._tail = 1, 0
    elseif self._tail - self._head > 2 * self.count + GAPS then
      compact(self)
    end
    local index, spare = self._tail + 1, self._spare
    local last = #spare
    waiter = spare[last] or { condition = self._runtime.condition() }
    spare[last] = nil
    waiter.confirmation, waiter.index, waiter.own, waiter.users, waiter.listed = confirmation, index, own, 0, true
    self._tail, self._order[index], self._of[confirmation] = index, waiter, waiter
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

-- Takes it off the lists; those who wait refer to it still.
local function drop(self, waiter)
  if not waiter.listed then return end
  waiter.listed = false
  self._of[waiter.confirmation] = nil
  self._order[waiter.index] = false
  self.count = self.count - 1
end

--- Waits no longer.
function Waiters:leave(waiter)
  waiter.users = waiter.users - 1
  if waiter.users > 0 then return end
  drop(self, waiter)
  waiter.confirmation = nil
  local spare = self._spare
  if #spare < SPARE then spare[#spare + 1] = waiter end
end

--- Waits for so many seconds. Throws as Session:block, and has left then: what was `own` is to be told to others.
function Waiters:block(session, waiter, left, own)
  local whole, err = session:try_block(waiter.condition, left)
  if whole then return end
  if own then waiter.own = false end
  self:leave(waiter)
  error(err, 0)
end

--- Wakes everybody: there is nothing to wait for any more.
function Waiters:release()
  for _, waiter in pairs(self._of) do
    waiter.listed = false
    waiter.condition:broadcast()
  end
  self._of, self._order, self._head, self._tail, self.count = {}, {}, 1, 0, 0
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
      drop(self, waiter)
      waiter.condition:broadcast()
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
  self._runtime.spawn(function()
    self._runtime.sleep(SWEEP)
    self._sweeping = false
    wake(self, huge)
  end)
  self._sweeping = true
end

return Waiters
