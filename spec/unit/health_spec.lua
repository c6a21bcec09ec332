-- The health strategies against a broker, a line and a process in virtual time.
local health = require "moonrabbit.health"
local Window = require "moonrabbit.health.window"

-- ---- A world ------------------------------------------------------------------------------------------------

-- Runs a detector for `seconds`. world:
--   heartbeat    the interval; the broker sends one each half of it when it has said nothing else
--   trip(n, now) seconds that the answer to the n-th probe takes; nil: no answer
--   traffic      { from, to, every }: what else the broker sends
--   gone         when the line falls silent
--   stall        { from, to }: this process stands still
--   judge_first  the loop looks before it reads
--   paused       { from, to }: reading is paused
--   blocked      { from, to }: the broker reads nothing, so nothing can be asked
-- Returns when the broker was suspected, the suspicion, and how often it was asked.
local function live(opts, world, seconds)
  local now, asked, answers = 0, 0, {}
  local gone = world.gone or math.huge
  local checked = health.checked("connect", opts, world.heartbeat)
  local detector = health.new(checked, world.heartbeat, 0)
  -- What comes by itself: { when next, every, until }
  local streams = {}
  if world.heartbeat > 0 then streams[1] = { world.heartbeat / 2, world.heartbeat / 2, math.huge } end
  if world.traffic then streams[#streams + 1] = { world.traffic[1], world.traffic[3], world.traffic[2] } end
  local function within(span) return span and now >= span[1] and now < span[2] end
  local look_at = detector:next_check(0)

  -- What the socket holds is read before anything is judged, as the loop does.
  local function read()
    for _, stream in ipairs(streams) do
      while stream[1] <= math.min(now, stream[3]) and stream[1] < gone do
        detector:heard(now)
        stream[1] = stream[1] + stream[2]
      end
    end
    for i = #answers, 1, -1 do
      local answer = answers[i]
      if answer.at <= now then
        table.remove(answers, i)
        detector:heard(now)
        detector:probed(now, now - answer.asked)
      end
    end
  end

  while now < seconds do
    local at = look_at
    for _, stream in ipairs(streams) do
      if stream[1] <= stream[3] and stream[1] < gone then at = math.min(at, stream[1]) end
    end
    for _, answer in ipairs(answers) do at = math.min(at, answer.at) end
    now = math.max(now, at)
    if within(world.stall) then now = world.stall[2] end
    if world.paused and now >= world.paused[1] and not world.was_paused then
      world.was_paused = true
      detector:pause(true, now)
      now = world.paused[2]
      detector:pause(false, now)
    end
    if not world.judge_first then read() end
    if now >= look_at then
      local suspicion = detector:check(now)
      if suspicion then
        now = now + 0.01
        read()
        suspicion = detector:check(now)
      end
      if suspicion then return now, suspicion, asked end
      if detector:wants_probe(now) and not within(world.blocked) then
        asked = asked + 1
        local trip = world.trip and world.trip(asked, now)
        detector:probe_sent(now)
        if trip and now + trip < gone then answers[#answers + 1] = { at = now + trip, asked = now } end
      end
      look_at = detector:next_check(now)
      assert.is_true(look_at > now)
    end
    read()
  end
  return nil, nil, asked
end

local function quick() return 0.002 end

describe("health", function()
  describe("fixed", function()
    it("suspects after the multiple of the interval", function()
      local at, suspicion = live({ strategy = "fixed", multiple = 1.5 }, { heartbeat = 10, gone = 21 }, 100)
      assert.is_near(20 + 15, at, 0.01)
      assert.equal("fixed", suspicion.strategy)
      assert.matches("nothing heard from the broker for 15.0 s, 1.5 heartbeat intervals", suspicion.text)
    end)

    it("asks nothing, and is content with heartbeats", function()
      local at, _, asked = live("fixed", { heartbeat = 10 }, 1000)
      assert.is_nil(at)
      assert.equal(0, asked)
    end)
  end)

  describe("adaptive", function()
    it("suspects an answer far longer than the others, within half an interval", function()
      local at, suspicion = live("adaptive", { heartbeat = 20, trip = quick, gone = 101 }, 200)
      -- Heard at 100, asked at 105, and 5 s is what an answer may always take.
      assert.is_near(110, at, 0.1)
      assert.equal("adaptive", suspicion.strategy)
      assert.matches("the broker was asked 5.0 s ago, and nothing came: the last %d+ answers took 0.002 s",
        suspicion.text)
    end)

    it("learns what a slow line is like", function()
      local function slow(n) return n % 2 == 0 and 2.5 or 1.5 end
      local opts = { strategy = "adaptive", probe = 5, least = 0.1 }
      assert.is_nil((live(opts, { heartbeat = 20, trip = slow }, 1000)))
      local at, suspicion = live(opts, { heartbeat = 20, trip = slow, gone = 501 }, 1000)
      -- 2 s on average and half a second's deviation: six of them make 5 s.
      assert.is_true(at >= 501 + 5 and at < 501 + 5 + 5.2, tostring(at))
      assert.matches("take?s? 2 s, give or take 0.5 s", (suspicion.text:gsub("took", "take")))
    end)

    it("does not take the end of a burst for silence", function()
      local world = { heartbeat = 20, trip = quick, traffic = { 0.001, 30, 0.001 } }
      assert.is_nil((live({ strategy = "adaptive", least = 0.5 }, world, 60)))
    end)

    it("is no quicker than an interval where nothing can be asked", function()
      local world = { heartbeat = 20, trip = quick, blocked = { 50, 400 } }
      assert.is_nil((live({ strategy = "adaptive", least = 0.1 }, world, 400)))
      world.gone = 300
      local at, suspicion = live({ strategy = "adaptive", least = 0.1 }, world, 400)
      assert.is_true(at >= 310 and at <= 330, tostring(at))
      assert.matches("nothing heard from the broker for .* the last %d+ gaps took", suspicion.text)
    end)

    it("forgets what lies before its window", function()
      local function changing(n) return n < 50 and 3 or 0.001 end
      local opts = { strategy = "adaptive", probe = 4, least = 0.5, window = 10 }
      local at = live(opts, { heartbeat = 20, trip = changing, gone = 1001 }, 2000)
      assert.is_true(at < 1001 + 4 + 0.6, tostring(at))
    end)

    it("learns nothing from a round trip in which this process stood still", function()
      local detector = health.new({ strategy = "adaptive" }, 10, 0)
      detector:probe_sent(2.5)
      detector:next_check(2.5)
      detector:check(100)
      detector:heard(100)
      detector:probed(100, 97.5)
      assert.equal(0, detector.judge.trips.count)
    end)

    it("holds until enough answers are known", function()
      local opts = { strategy = "adaptive", probe = 5, least = 0.1 }
      assert.is_nil((live(opts, { heartbeat = 20, trip = function(n) return n == 1 and 0.01 or 4 end }, 60)))
    end)
  end)

  describe("consecutive", function()
    it("suspects after so many periods without an answer", function()
      local at, suspicion = live({ strategy = "consecutive", probe = 2, misses = 4 },
        { heartbeat = 20, trip = quick, gone = 101 }, 200)
      -- Heard at 100 or shortly before, asked 2 s later, and then four periods.
      assert.is_true(at > 108 and at < 111, tostring(at))
      assert.equal("consecutive", suspicion.strategy)
      assert.matches("in 4 periods of 2 s in a row", suspicion.text)
    end)

    it("begins anew with each sign of life", function()
      local function every_third(n) return n % 3 == 0 and 5.9 or 0.001 end
      assert.is_nil((live({ strategy = "consecutive", probe = 2, misses = 3 },
        { heartbeat = 60, trip = every_third }, 500)))
    end)

    it("counts no period twice, however long this process stood still", function()
      local world = { heartbeat = 20, trip = quick, stall = { 99, 140 }, gone = 99 }
      local at = live({ strategy = "consecutive", probe = 2, misses = 3 }, world, 200)
      assert.is_true(at > 140 + 5 and at < 140 + 10, tostring(at))
    end)

    it("works without heartbeats, by its probe alone", function()
      local opts = { strategy = "consecutive", probe = 5, misses = 2 }
      assert.is_nil((live(opts, { heartbeat = 0, trip = quick }, 1000)))
      local at = live(opts, { heartbeat = 0, trip = quick, gone = 500 }, 1000)
      assert.is_true(at > 505 and at < 516, tostring(at))
    end)

    it("without probes counts from when a heartbeat is overdue", function()
      local opts = { strategy = "consecutive", probe = false, misses = 2 }
      assert.is_nil((live(opts, { heartbeat = 10 }, 1000)))
      local at = live(opts, { heartbeat = 10, gone = 501 }, 1000)
      assert.is_true(at >= 515 and at <= 517.5, tostring(at))
    end)
  end)

  for _, strategy in ipairs { "fixed", "adaptive", "consecutive" } do
    describe(strategy, function()
      it("suspects nobody while this process stood still", function()
        for from = 40, 60, 0.3 do
          local world = { heartbeat = 10, trip = quick, stall = { from, from + 100 } }
          assert.is_nil((live(strategy, world, 300)))
          world.judge_first = true
          assert.is_nil((live(strategy, world, 300)))
        end
      end)

      it("suspects nobody while reading was paused", function()
        for from = 40, 60 do
          local world = { heartbeat = 10, trip = quick, paused = { from + 0.3, from + 100 } }
          assert.is_nil((live(strategy, world, 300)))
        end
      end)

      it("judges nothing that it may not read, and begins anew afterwards", function()
        local detector = health.new({ strategy = strategy }, 10, 0)
        detector:probe_sent(1)
        detector:pause(true, 1.1)
        for at = 2, 400, 0.5 do
          assert.is_nil(detector:check(at))
          assert.is_false(detector:wants_probe(at))
          detector:next_check(at)
        end
        detector:pause(false, 400)
        detector:next_check(400)
        assert.is_nil(detector:check(400.3))
      end)

      it("does not count the time in which this process stood still against an open question", function()
        local detector = health.new({ strategy = strategy }, 10, 0)
        detector:probe_sent(2.5)
        assert.is_true(detector:next_check(2.5) < 7)
        for at = 100, 101, 0.1 do
          assert.is_nil(detector:check(at))
          detector:next_check(at)
        end
      end)

      it("suspects nobody who blocks publishing, for his heartbeats go on", function()
        assert.is_nil((live(strategy, { heartbeat = 10, trip = quick, blocked = { 33, 400 } }, 500)))
      end)

      it("suspects nobody whose heartbeats come a whole interval apart and who answers no probe", function()
        local world = { heartbeat = 10, traffic = { 1, 500, 4.9 } }
        assert.is_nil((live(strategy, world, 500)))
      end)

      it("notices within two intervals that nobody is there", function()
        for gone = 50, 60 do
          local at = live(strategy, { heartbeat = 10, trip = quick, gone = gone }, 300)
          assert.is_true(at and at - gone <= 20.1, tostring(at))
        end
      end)

      it("notices it in that time too where nothing can be asked, for the socket is full", function()
        for gone = 50, 60 do
          for from = gone - 15, gone + 5 do
            local at = live(strategy, { heartbeat = 10, trip = quick, gone = gone, blocked = { from, 400 } }, 300)
            assert.is_true(at and at - gone <= 20.1, tostring(at))
          end
        end
      end)
    end)
  end

  it("looks seldom", function()
    local detector = health.new({ strategy = "adaptive" }, 60, 0)
    local looks, now = 0, 0
    while now < 600 do
      detector:heard(now)
      detector:check(now)
      now = detector:next_check(now)
      looks = looks + 1
    end
    assert.is_true(looks <= 41, tostring(looks))
  end)

  it("does not turn in circles while it may not ask", function()
    local _, _, asked = live("adaptive", { heartbeat = 20, trip = quick, blocked = { 0, 1000 } }, 300)
    assert.equal(0, asked)
  end)

  describe("the window", function()
    it("has the mean and the standard deviation of the last samples", function()
      local window = Window.new(3)
      assert.same({ 0, 0 }, { window:moments() })
      for _, sample in ipairs { 1000, 2, 4, 6 } do window:add(sample) end
      local mean, deviation = window:moments()
      assert.equal(3, window.count)
      assert.equal(4, mean)
      assert.is_near(math.sqrt(8 / 3), deviation, 1e-9)
      window:add(6)
      assert.is_near(16 / 3, (window:moments()), 1e-9)
    end)
  end)

  describe("the option", function()
    local moonrabbit = require "moonrabbit"

    local uri = "amqp://127.0.0.1:1/"

    local function complain(given, heartbeat)
      local ok, message = pcall(moonrabbit.connect, { uri = uri, health = given, heartbeat = heartbeat })
      assert.is_false(ok)
      return message
    end

    it("takes a name, a table, true or false", function()
      for _, given in ipairs { "fixed", "adaptive", "consecutive", {}, true, false,
        { strategy = "fixed", multiple = 1 }, { strategy = "fixed", multiple = 2, probe = 3 },
        { strategy = "adaptive", probe = 1, window = 50, deviations = 8, least = 0.2 }, { probe = false },
        { strategy = "consecutive", probe = 0.5, misses = 1 } } do
        local conn, err = moonrabbit.connect { uri = uri, health = given }
        assert.is_nil(conn)
        assert.equal("refused", err.kind)
      end
    end)

    it("refuses what makes no sense, and says why", function()
      assert.matches('option \'health\' must be "fixed" or "adaptive" or "consecutive"', complain "phi")
      assert.matches("option 'health' must be", complain(5))
      assert.matches("unknown option 'multipel' %(did you mean 'multiple'%?%)", complain { multipel = 2 })
      assert.matches("option 'strategy' must be", complain { strategy = "swift" })
      assert.matches("option 'multiple' must be a number from 1 to 2, not 0.5",
        complain { strategy = "fixed", multiple = 0.5 })
      assert.matches("option 'multiple' must be a number from 1 to 2, not 3",
        complain { strategy = "fixed", multiple = 3 })
      assert.matches("option 'probe' must be a number of seconds above 0 or false", complain { probe = 0 })
      assert.matches("option 'probe' must be a number of seconds above 0 or false", complain { probe = math.huge })
      assert.matches("option 'probe' must be", complain { probe = 0 / 0 })
      assert.matches("option 'window' must be an integer from 2 to 10000", complain { window = 1 })
      assert.matches("option 'deviations' must be", complain { deviations = 0 })
      assert.matches("option 'least' must be", complain { least = -1 })
      assert.matches("option 'misses' must be an integer from 1", complain { strategy = "consecutive", misses = 0 })
      assert.matches("'misses' belongs to the strategy 'consecutive', not to 'adaptive'", complain { misses = 3 })
      assert.matches("'multiple' belongs to the strategy 'fixed'", complain { strategy = "consecutive", multiple = 2 })
    end)

    it("wants heartbeats, or to be told how often to ask", function()
      assert.matches("'fixed' counts heartbeat intervals, and heartbeats are off", complain("fixed", 0))
      assert.matches("heartbeats are off, so 'probe' must say", complain("adaptive", 0))
      assert.matches("heartbeats are off, so 'probe' must say",
        complain({ strategy = "consecutive", probe = false }, 0))
      local conn, err = moonrabbit.connect { uri = uri, health = { probe = 5 }, heartbeat = 0 }
      assert.is_nil(conn)
      assert.equal("refused", err.kind)
    end)

    it("blames the caller", function()
      local _, message = pcall(function()
        return (moonrabbit.connect { health = { misses = 3 } })
      end)
      assert.matches("health_spec.lua:" .. (debug.getinfo(1, "l").currentline - 2), message)
    end)
  end)
end)
