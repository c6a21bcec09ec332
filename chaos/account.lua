--- What the ledgers of one fault come to, for one queue. Pure.
--
-- lost: confirmed (or taken by an outbox) and never delivered. duplicated: deliveries beyond the first.
-- out of order: first deliveries that came after one with a higher serial.
local account = {}

-- A connection that is lost says one of these.
local noticed = { recovering = true, closed = true, cancelled = true }

local function gap(times, from, to)
  local last, longest, at = from, 0, from
  for _, time in ipairs(times) do
    if time >= from then
      if time > to then time = to end
      if time - last > longest then longest, at = time - last, time end
      last = time
    end
  end
  if to - last > longest then longest, at = to - last, to end
  return longest, at
end

--- The longest time without an event from `from` to `to`: seconds, and when it ended.
account.gap = gap

local function times_of(entries, queue, kind)
  local list = {}
  for _, entry in ipairs(entries) do
    if entry.queue == queue and entry.kind == kind then list[#list + 1] = entry.at end
  end
  return list
end

-- Seconds from `from` until somebody noticed something; nil: there was nothing to notice. What comes after `to` is
-- the workers' own goodbye.
local function detection(queue, from, to, ...)
  local first
  for _, entries in ipairs { ... } do
    for _, entry in ipairs(entries) do
      if entry.queue == queue and entry.kind == "event" and entry.at >= from and entry.at < to
        and noticed[entry.text:match "^%S+"] and (not first or entry.at < first) then
        first = entry.at
      end
    end
  end
  return first and first - from
end

-- Seconds from the loss of the publisher's connection until it is open again, and to the first confirm after the loss:
-- nil when it was not lost.
local function failover(entries, queue, from)
  local lost, back
  for _, entry in ipairs(entries) do
    if entry.queue == queue and entry.at >= from then
      local event = entry.kind == "event" and entry.text:match "^%S+"
      if event == "recovering" then lost = lost or entry.at end
      if event == "open" and lost then back = back or entry.at - lost end
      if lost and entry.kind == "confirmed" then return back, entry.at - lost end
    end
  end
  return back
end

--- The sums of one queue.
---@param queue string
---@param published table   entries of the publisher's ledger
---@param consumed table    entries of the consumer's
---@param from number       when the fault began
---@param to number         when the load ended
function account.of(queue, published, consumed, from, to)
  local promised, seen = {}, {}
  local sums = { confirmed = 0, delivered = 0, lost = 0, duplicated = 0, out_of_order = 0, failed = 0, missing = {} }
  for _, entry in ipairs(published) do
    if entry.queue == queue then
      if entry.kind == "confirmed" or entry.kind == "sent" then
        promised[entry.serial] = true
        if entry.kind == "confirmed" then sums.confirmed = sums.confirmed + 1 end
      elseif entry.kind == "failed" then
        sums.failed = sums.failed + 1
      end
    end
  end
  local highest = 0
  for _, entry in ipairs(consumed) do
    if entry.queue == queue and entry.kind == "delivered" then
      if seen[entry.serial] then
        sums.duplicated = sums.duplicated + 1
      else
        seen[entry.serial] = true
        sums.delivered = sums.delivered + 1
        if entry.serial < highest then sums.out_of_order = sums.out_of_order + 1 end
        highest = math.max(highest, entry.serial)
      end
    end
  end
  for serial in pairs(promised) do
    if not seen[serial] then
      sums.lost = sums.lost + 1
      sums.missing[#sums.missing + 1] = serial
    end
  end
  table.sort(sums.missing)
  sums.detect = detection(queue, from, to, published, consumed)
  sums.back, sums.failover = failover(published, queue, from)
  sums.publish_gap = gap(times_of(published, queue, "confirmed"), from, to)
  sums.deliver_gap = gap(times_of(consumed, queue, "delivered"), from, to)
  return sums
end

return account
