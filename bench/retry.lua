-- Retries on the ladder, measured: 10,000 messages with delays from 0.1 s to 60 s mixed, half of them of a queue that is
-- deleted half-way. Says how many came home early (none may), how late the latest was beyond its step (at most 0.1 s),
-- and where the deleted queue's messages are (among the orphans, all of them).
--
--     scripts/with-broker -- lua5.4 bench/retry.lua [messages] [longest delay]
dofile((arg[0]:match "^(.*)/" or ".") .. "/paths.lua")
local moonrabbit = require "moonrabbit"
local disposal = require "moonrabbit.app.disposal"
local native = require "moonrabbit.runtime.native"
local steps = require "moonrabbit.app.steps"

local TOTAL = tonumber(arg[1]) or 10000
local LONGEST = tonumber(arg[2]) or 60
local WRITERS = 16
local url = assert(os.getenv "AMQP_URL", "AMQP_URL: use scripts/with-broker")
local app = "bench-retry"
local kept, doomed = app .. ".kept", app .. ".doomed"

local function quantile(sorted, share) return sorted[math.max(1, math.ceil(#sorted * share))] or 0 end

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

  local late, early, worst_message = {}, 0, nil
  local home, blocked = 0, 0
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
      local over = now - (trip.confirmed or now) - trip.step
      late[#late + 1] = over
      if over > 0.1 then blocked = blocked + 1 end
      if not worst_message or over > worst_message.over then worst_message = { over = over, delay = trip.delay } end
    end
  end)

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

  table.sort(late)
  print(("home: %d of %d, %d early"):format(home, TOTAL / 2, early))
  print(("later than the step: median %.3f s, 99 %% %.3f s, worst %.3f s (a delay of %.2f s), %d by more than 0.1 s")
    :format(quantile(late, 0.5), quantile(late, 0.99), late[#late] or 0, worst_message.delay, blocked))
  print(("of the deleted queue: %d home before, %d orphans, %d lost"):format(gone, orphans, TOTAL / 2 - gone - orphans))
  local fine = home == TOTAL / 2 and early == 0 and (late[#late] or 1) <= 0.1 and gone + orphans == TOTAL / 2

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
