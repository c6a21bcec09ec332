--- What becomes of a keeper's messages: confirmed, refused and to go again, failed for good.
-- @module moonrabbit.publisher.keeper

local core = require "moonrabbit.core"
local random = require "moonrabbit.random"
local sending = require "moonrabbit.publisher.keeper.sending"

local refresh = sending._refresh
local acked, outcome_of, conclude_core = core.acked, core.outcome, core.conclude
local huge = math.huge

-- How many failed messages are remembered for Publisher:wait.
local MAX_FAILURES = 10000

---@class moonrabbit.publisher.Keeper
local Keeper = {}

-- What a confirmation failed of.
local failure_of = setmetatable({}, { __mode = "k" })

--- The error of a confirmation that is settled and not acked.
---@package
function Keeper:_failure(confirmation)
  return failure_of[confirmation] or self.channel:_failure(confirmation)
end

--- A record is done with.
---@package
function Keeper:_over(record)
  self:_not_due(record.number, record)
  self._troubled[record.number] = nil
  if record.row then self._outbox:done(record.row) end
end

-- Something has been settled: the ring may shrink, and whoever waits for that goes on.
local function advance(self)
  local ring = self.ring
  if ring:advance(self._ended) then
    if self._outbox then self:_load() end
    self._room:signal()
  end
  if ring.first > ring.last then
    self._unsent = nil
    self._settled:broadcast()
  end
  if self._renewal.by and self.channel._core:unconfirmed() == 0 then self:_wake_at(self.runtime.now()) end
  if self._unsent and not self._feeding then self:_pour() end
  refresh(self)
end

---@package
Keeper._advance = advance

--- Some publishes of the channel were acked.
---@package
function Keeper:_confirmed()
  self.waiters:wake()
  advance(self)
end

-- Remembered for who waits for all of them.
local function remember(self, n, outcome, err)
  local failures = self._failures
  if #failures < MAX_FAILURES then
    failures[#failures + 1] = { seq = n, outcome = outcome, err = err }
  else
    failures.more = (failures.more or 0) + 1
  end
end

--- A message has failed for good.
---@package
function Keeper:_conclude(n, outcome, err)
  local message, confirmation = self.ring:at(n)
  if not message or acked(confirmation) then return end
  conclude_core(confirmation, outcome)
  failure_of[confirmation] = err
  if type(message) == "table" then
    if message.row then
      self._outbox:failed(message.row)
      message.row = nil
    end
    self:_over(message)
  end
  self.ring:settle(n)
  if not self.waiters:settled(confirmation) then remember(self, n, outcome, err) end
  advance(self)
end

--- A publish of the channel was refused or came back; false: it is none of the publisher's.
---@package
function Keeper:_failed(outcome, confirmation, err)
  local _, _, n = outcome_of(confirmation)
  if not n then return false end
  local message, current = self.ring:at(n)
  if not message or current ~= confirmation then return true end
  local record, now = self.ring:record(n), self.runtime.now()
  record.attempts = (record.attempts or 0) + 1
  if self._policy.deadline < huge then record.give_up = record.give_up or now + self._policy.deadline end
  local delay = self._policy:delay(outcome, record.attempts, random.number())
  if not delay or now + delay > (record.give_up or huge) then
    self:_conclude(n, outcome, err)
    return true
  end
  record.err, record.outcome = err, outcome
  self:_go_later(n, record, now + delay)
  advance(self) -- there is room in the channel's window for the next one
  return true
end

return Keeper
