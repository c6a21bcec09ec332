-- Retries on the ladder, measured: 10,000 messages with delays from 0.1 s to 60 s mixed, half of them of a queue that is
-- deleted half-way. Says how many came home early (none may), how late the latest was beyond its step (at most 0.1 s),
-- and where the deleted queue's messages are (among the orphans, all of them).
--
-- At the same time 2,500 messages with such delays take the same wait queues without any Lua, and as many again bare
-- queues with a TTL. A broker or a machine that stands still makes them late as well, at the same moments; and when
-- this process gets no CPU, its own timers are late. So it says which of the late ones are only the client's.
--
--     scripts/with-broker -- lua5.4 bench/retry.lua [messages] [longest delay]
dofile((arg[0]:match "^(.*)/" or ".") .. "/paths.lua")
local moonrabbit = require "moonrabbit"
local disposal = require "moonrabbit.app.disposal"
local native = require "moonrabbit.runtime.native"
local raw_ladder = dofile((arg[0]:match "^(.*)/" or ".") .. "/raw_ladder.lua")
local steps = require "moonrabbit.app.steps"

local TOTAL = tonumber(arg[1]) or 10000
local LONGEST = tonumber(arg[2]) or 60
local WRITERS = 16
-- Seconds: what may not be, and what is worth a second look.
local LIMIT, LATE = 0.1, 0.05
local url = assert(os.getenv "AMQP_URL", "AMQP_URL: use scripts/with-broker")
local app = "bench-retry"
local kept, doomed = app .. ".kept", app .. ".doomed"

local function quantile(sorted, share) return sorted[math.max(1, math.ceil(#sorted * share))] or 0 end

local function lateness_of(list)
  local sorted, blocked = {}, 0
  for i, each in ipairs(list) do
    sorted[i] = each.over
    if each.over > LIMIT then blocked = blocked + 1 end
  end
  table.sort(sorted)
  return ("median %.3f s, 99 %% %.3f s, worst %.3f s, %d of %d by more than %g s"):format(quantile(sorted, 0.5),
    quantile(sorted, 0.99), sorted[#sorted] or 0, blocked, #list, LIMIT), sorted[#sorted] or 1
end

local function near_a_late_one(list, at)
  for _, each in ipairs(list) do
    if each.over > LATE and math.abs(each.at - at) < LATE then return true end
  end
  return false
end

-- Of those that were late: how many came home when one without Lua was late as well, when not and this process was held
-- up, and when neither.
local function causes(ours, others, held_up)
  local count = { late = 0, others = 0, held_up = 0, neither = 0 }
  for _, each in ipairs(ours) do
    if each.over > LATE then
      local cause = near_a_late_one(others, each.at) and "others" or near_a_late_one(held_up, each.at) and "held_up"
        or "neither"
      count.late, count[cause] = count.late + 1, count[cause] + 1
    end
  end
  return count
end

-- When a timer of this process was late, and how much: by the machine, the collector or its own doing. `cpu`: what the
-- process used of it at the worst.
local function watch_itself()
  local list = { worst = 0, cpu = 0 }
  native.spawn(function()
    while not list.ended do
      local due, used = native.now() + 0.005, os.clock()
      native.sleep(0.005)
      local over = native.now() - due
      if over > list.worst and not list.ended then list.worst, list.cpu = over, os.clock() - used end
      if over > LATE then list[#list + 1] = { at = native.now(), over = over } end
    end
  end)
  return list
end

-- Delays spread evenly over the decades, the same ones each time.
local seed = 4711
local function next_delay()
  seed = seed * 16807 % 2147483647
  return 0.1 * (LONGEST / 0.1) ^ (seed / 2147483647)
end

-- What the broker was just handing to the deleted queue it offers again after three minutes, unless told otherwise. This
-- has to be said before the wait queues are there.
local function offer_again_soon()
  local broker = os.getenv "MOONRABBIT_BROKER"
  if not broker then return end
  os.execute(("scripts/broker ctl --name %s eval 'application:set_env(rabbit, "
    .. "dead_letter_worker_publisher_confirm_timeout, 5000).' > /dev/null"):format(broker))
end

offer_again_soon()
moonrabbit.run(function()
  local conn, out = assert(moonrabbit.connect(url)), assert(moonrabbit.connect(url))
  local ch = assert(conn:channel { prefetch = 1000 })
  local publishes = assert(out:channel { confirm = true })
  local disposals = {}
  for _, queue in ipairs { kept, doomed } do
    assert(ch:queue_delete(queue))
    assert(ch:queue_declare(queue, { durable = true }))
    local d = disposal.new { app = app, publisher = function() return publishes end, log = print,
      consumer = { queue = queue, ladder = disposals[1] and disposals[1].ladder } }
    assert(d:setup(ch))
    assert(ch:queue_purge(d.ladder.orphans))
    disposals[#disposals + 1] = d
  end

  -- The copies' trip is what is measured: the originals are all read first.
  local sent, began = {}, native.now()
  local originals = {}
  for i, queue in ipairs { kept, doomed } do
    local consumer = assert(ch:consume(queue, { prefetch = 0 }))
    for n = 1, TOTAL / 2 do
      assert(publishes:publish_async(tostring((i - 1) * TOTAL / 2 + n), { routing_key = queue }))
    end
    for _ = 1, TOTAL / 2 do originals[#originals + 1] = { consumer:receive(30), disposals[i] } end
    assert(consumer:cancel())
  end
  print(("%d messages read in %.1f s"):format(#originals, native.now() - began))

  -- The steps are declared beforehand: what is measured is the waiting, not a broker that makes 90 quorum queues.
  local seen = {}
  local delays = {}
  for i = 1, TOTAL do
    delays[i] = next_delay()
    local step = steps.of(delays[i])
    if not seen[step] then
      seen[step] = true
      assert(disposals[1].ladder:exchange(out, step))
    end
  end
  local count = 0
  for _ in pairs(seen) do count = count + 1 end

  local raws = {}
  if raw_ladder.there() then
    raws[1] = { "the same without Lua", raw_ladder.on(ch, app .. ".raw", disposals[1].ladder) }
    raws[2] = { "bare classic queues", raw_ladder.bare(ch, app .. ".bare", seen) }
  end
  local came, early, home = {}, 0, 0
  local consumer = assert(ch:consume(kept, { prefetch = 0, no_ack = true }))
  native.spawn(function()
    while true do
      local msg = consumer:receive(LONGEST * 1.2 + 60)
      if not msg then break end
      local now = native.now()
      local trip = sent[tonumber(msg.body)]
      home = home + 1
      if now < trip.at + trip.delay then early = early + 1 end
      -- Late is what is later than its step from when the broker had the copy at the latest.
      came[home] = { at = now, over = now - (trip.confirmed or now) - trip.step }
    end
  end)

  local list = {}
  for i = 1, TOTAL, 4 do list[#list + 1] = steps.of(delays[i]) end
  for _, each in ipairs(raws) do each[2]:start(url, list, LONGEST * 1.2 + 60) end
  local held_up = watch_itself()
  began = native.now()
  local next_one, running = 0, WRITERS
  local failure = { message = "bench", kind = "error" }
  for _ = 1, WRITERS do
    native.spawn(function()
      while next_one < TOTAL do
        next_one = next_one + 1
        -- The two queues by turns.
        local half = TOTAL / 2
        local i = next_one % 2 == 1 and (next_one + 1) / 2 or half + next_one / 2
        local msg, d = originals[i][1], originals[i][2]
        local number = tonumber(msg.body)
        sent[number] = { at = native.now(), delay = delays[next_one], step = steps.of(delays[next_one]) / 1000 }
        assert(d:retry(msg, delays[next_one], failure))
        sent[number].confirmed = native.now()
        msg:ack()
      end
      running = running - 1
    end)
  end
  while running > 0 do native.sleep(0.05) end
  local took = native.now() - began
  print(("%d copies confirmed in %.1f s (%.0f/s), on %d steps"):format(TOTAL, took, TOTAL / took, count))

  native.sleep(math.max(0, LONGEST / 2 - took))
  local gone = assert(ch:queue_delete(doomed))
  print(("the queue '%s' is deleted after %.0f s, with %d messages that were home"):format(doomed,
    native.now() - began, gone))

  local deadline = native.now() + LONGEST * 1.2 + 30
  local orphans
  repeat
    native.sleep(0.2)
    local probe = assert(out:channel())
    orphans = assert(probe:queue_declare(disposals[1].ladder.orphans, { passive = true })).message_count
    probe:close()
  until (home >= TOTAL / 2 and orphans + gone >= TOTAL / 2) or native.now() > deadline

  print(("home: %d of %d, %d early"):format(home, TOTAL / 2, early))
  local text, worst = lateness_of(came)
  print("later than the step: " .. text)
  held_up.ended = true
  local others = {}
  for _, each in ipairs(raws) do
    local found = each[2]:finish()
    print(("%-20s %s"):format(each[1] .. ":", (lateness_of(found))))
    for _, one in ipairs(found) do others[#others + 1] = one end
  end
  local cause = causes(came, others, held_up)
  print(("ours later than %g s: %d; %d of them while one without Lua was late as well, %d while this process was held "
    .. "up (by %.3f s at most, of which it used %.3f s), %d else"):format(LATE, cause.late, cause.others, cause.held_up,
    held_up.worst, held_up.cpu, cause.neither))
  print(("of the deleted queue: %d home before, %d orphans, %d lost"):format(gone, orphans, TOTAL / 2 - gone - orphans))
  local fine = home == TOTAL / 2 and early == 0 and worst <= LIMIT and gone + orphans == TOTAL / 2

  for step in pairs(seen) do
    local name = disposals[1].ladder:wait_name(step)
    assert(ch:queue_delete(name))
    assert(ch:exchange_delete(name))
  end
  for _, name in ipairs { kept, app .. ".home", app .. ".orphans", app .. ".dead" } do
    assert(ch:queue_delete(name))
    assert(ch:exchange_delete(name))
  end
  conn:close()
  out:close()
  os.exit(fine and 0 or 1)
end)
