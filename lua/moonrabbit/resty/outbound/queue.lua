--- The queue of a worker: a ring of bounded size.
--
-- From `head` to `next` is what was sent and is not settled yet, from `next` to `tail` what is to be sent. A message stays
-- in it until the broker has confirmed it; the bounds hold for both parts together.
--
-- The broker may confirm one message late or never, and thousands after it: those leave gaps. They are closed when there are
-- more than messages, so that one alone holds nothing up, and the ring needs a bounded number of places.
-- @module moonrabbit.resty.outbound.queue

local life = require "moonrabbit.resty.life"
local runtime = require "moonrabbit.runtime.resty"
local new_table = require "table.new"

local now = runtime.now

local queue = {}

-- Seconds between two lines in the log about messages that failed with nobody waiting for them.
local LOG_EVERY = 10

-- So many gaps are none to speak of.
local GAPS = 256

--- Makes the ring. Index i has place i % slots + 1. Kept is the body where nobody waits, else the waiter, which has it;
--- false where there is no message any more.
---@param self moonrabbit.resty.Outbound
function queue.init(self)
  local slots = 2 * self.entries + GAPS
  self.kept, self.routes, self.confirmations = new_table(slots, 0), new_table(slots, 0), new_table(slots, 0)
  for slot = 1, slots do
    self.kept[slot], self.routes[slot], self.confirmations[slot] = false, false, false
  end
  self.slots = slots
  self.head, self.next, self.tail, self.count, self.bytes, self.in_flight = 1, 1, 1, 0, 0, 0
end

-- What is on its way into a queue that is half full is sent at once: nothing gathers any more.
local function crowded(self)
  return self.count > self.entries / 2 or self.bytes > self.config.bytes / 2
end

queue.crowded = crowded

-- Gives a message another index, further back, where there is none.
local function move(self, from, to)
  local kept, routes, confirmations, slots = self.kept, self.routes, self.confirmations, self.slots
  local here, there = from % slots + 1, to % slots + 1
  local message = kept[here]
  kept[there], routes[there], confirmations[there] = message, routes[here], confirmations[here]
  kept[here], routes[here], confirmations[here] = false, false, false
  if type(message) == "table" then message.index = to end
  if self.sending == from then self.sending = to end
end

-- The messages come to stand before the tail, in their order.
local function close_gaps(self)
  local to, next, sent_to, suspects = self.tail, self.next, self.sent_to, self.suspects
  for index = self.tail - 1, self.head, -1 do
    if self.kept[index % self.slots + 1] then
      to = to - 1
      if index < to then move(self, index, to) end
    end
    if index == self.next then next = to end
    if index == self.sent_to then sent_to = to end
    if index == self.suspects then suspects = to end
  end
  self.head, self.next, self.sent_to, self.suspects = to, next, sent_to, suspects
end

--- Puts a message in; never yields. nil, err when there is no room.
function queue.push(self, body, route, waiter)
  local size = #body
  if self.count >= self.entries or self.bytes + size > self.config.bytes then
    self.overflows = self.overflows + 1
    if self.metrics then self.metrics:touch() end
    return nil, self:error("overflow", ("the queue of this worker is full (%d messages, %d bytes of bodies)"):format(
      self.count, self.bytes), size <= self.config.bytes)
  end
  if not self.keeper:need() and life.exiting then
    return nil, self:error("shutdown", "the worker is almost gone: it sends nothing any more", true)
  end
  local tail = self.tail
  if tail - self.head >= 2 * self.count + GAPS then close_gaps(self) end
  local slot = tail % self.slots + 1
  self.kept[slot], self.routes[slot], self.confirmations[slot] = waiter or body, route, false
  self.tail, self.count, self.bytes, self.published = tail + 1, self.count + 1, self.bytes + size, self.published + 1
  if waiter then
    waiter.index, waiter.body = tail, body
    self.urgent = true
  end
  local sleeping = self.sleeping
  if sleeping == "any" or sleeping and (waiter or crowded(self)) then
    self.sleeping = nil
    self.wake:post(1)
  end
  if self.metrics then self.metrics:touch() end
  return true
end

-- The body of a message, and who waits for it.
local function what_is(kept)
  if type(kept) == "string" then return kept, nil end
  return kept.body, kept
end

queue.what_is = what_is

-- The head is a message, or the tail.
local function advance(self, head)
  local slots, kept, tail = self.slots, self.kept, self.tail
  while head < tail and not kept[head % slots + 1] do head = head + 1 end
  self.head = head
  if self.next < head then self.next = head end
end

queue.advance = advance

-- Takes a message out of the ring.
local function take_out(self, index)
  local kept, slot = self.kept, index % self.slots + 1
  self.count, self.bytes = self.count - 1, self.bytes - #what_is(kept[slot])
  if self.confirmations[slot] then self.in_flight = self.in_flight - 1 end
  kept[slot], self.routes[slot], self.confirmations[slot] = false, false, false
  advance(self, self.head)
end

queue.take_out = take_out

-- A failure that nobody waits for: in the log, but not for each of thousands.
local function unheard_of(self, err)
  self.unheard = self.unheard + 1
  if now() - self.unheard_at < LOG_EVERY then return end
  self.unheard_at = now()
  runtime.log("error", ("%s: messages failed with nobody waiting for them: %d; the last: %s"):format(self.config.name,
    self.unheard, tostring(err)))
  self.unheard = 0
end

--- Ends a message: whoever waits for it learns how.
function queue.finish(self, index, ok, err)
  local _, waiter = what_is(self.kept[index % self.slots + 1])
  take_out(self, index)
  if self.metrics then self.metrics:touch() end
  if ok then
    self.confirmed = self.confirmed + 1
  else
    self.failures[err.kind] = (self.failures[err.kind] or 0) + 1
  end
  if waiter then
    waiter.done, waiter.ok, waiter.err = true, ok, err
    waiter.semaphore:post(1)
  elseif not ok then
    unheard_of(self, err)
  end
end

return queue
