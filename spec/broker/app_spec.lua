-- Apps against the real broker: what they declare, how messages come to their outcome, how they start and stop.
local broker = require "support.broker"
local mr = require "moonrabbit"

local route, retry = mr.route, mr.retry
local it = broker.it_unless(it, pending, broker.none()) -- luacheck: ignore 431

describe("an app #app", function()
  local running, names, publishing

  before_each(function() running, names, publishing = nil, {}, nil end)

  -- A name that is deleted afterwards.
  local function name(prefix)
    names[#names + 1] = broker.unique(prefix)
    return names[#names]
  end

  local function connections()
    return { consume = broker.connect(), publish = broker.connect() }
  end

  local function start(spec)
    spec.log = spec.log or function() end
    running = mr.app(spec)
    broker.ok(running:start(connections()))
    publishing = broker.ok(broker.connect():channel { confirm = true })
    return running
  end

  local function declared(queue) return (broker.ok(publishing:queue_declare(queue, { passive = true }))) end

  after_each(function()
    if running then running:stop(5) end
    if names[1] and broker.url then
      local conn = broker.connect()
      for _, each in ipairs(names) do
        for _, method in ipairs { "queue_delete", "exchange_delete" } do
          local channel = conn:channel()
          channel[method](channel, each)
        end
      end
    end
    broker.close_all()
  end)

  -- Everything of a queue, acked: body -> how often.
  local function drained(queue)
    local found = {}
    while true do
      local msg = publishing:get(queue)
      if not msg then return found end
      found[msg.body] = (found[msg.body] or 0) + 1
      msg:ack()
    end
  end

  local function ladder_of(app)
    for _, each in ipairs { ".home", ".orphans", ".dead", ".wait.200ms" } do names[#names + 1] = app .. each end
  end

  it("declares its topology, consumes, and acks", function()
    local exchange, lost, queue, rest = name "x", name "lost", name "q", name "rest"
    local seen, settled = {}, 0
    start {
      name = name "app", observer = { settled = function() settled = settled + 1 end },
      exchanges = { [exchange] = { type = "topic", alternate = lost }, [lost] = { type = "fanout" } },
      queues = {
        [queue] = { type = "quorum", bind = { { exchange, "order.#" } } }, [rest] = { bind = { { lost } } },
      },
      consumers = {
        { queue = queue, route = route.first {
          route.key("order.*.created", function(msg) seen[#seen + 1] = "created " .. msg.body end),
          route.header({ type = "refund" }, function(msg) seen[#seen + 1] = "refund " .. msg.body end),
          route.otherwise(route.drop()),
        } },
      },
    }
    broker.ok(publishing:publish("1", { exchange = exchange, routing_key = "order.eu.created" }))
    broker.ok(publishing:publish("2", { exchange = exchange, routing_key = "order.x", headers = { type = "refund" } }))
    broker.ok(publishing:publish("3", { exchange = exchange, routing_key = "order.x" }))
    broker.ok(publishing:publish("4", { exchange = exchange, routing_key = "elsewhere" }))
    broker.eventually(function() return settled == 3 end)
    table.sort(seen)
    assert.same({ "created 1", "refund 2" }, seen)
    broker.ok(running:stop(5))
    assert.equal("stopped", running.state)
    assert.equal(0, declared(queue).message_count)
    assert.equal(1, declared(rest).message_count)
  end)

  it("retries on the ladder, and parks what fails for good", function()
    local app, queue = name "app", name "q"
    names[#names + 1] = app .. ".dead"
    local attempts = {}
    start {
      name = app, queues = { [queue] = {} },
      consumers = {
        { queue = queue, retry = retry.steps { 0.2, 0.2 }, handler = function(msg)
          attempts[#attempts + 1] = msg.body
          if msg.body == "poison" then error(mr.permanent "spoilt") end
          if #attempts < 3 then return nil, "not yet" end
        end },
      },
    }
    broker.ok(publishing:publish("flaky", { routing_key = queue }))
    broker.eventually(function() return #attempts == 3 end)
    broker.ok(publishing:publish("poison", { routing_key = queue }))
    local letter
    broker.eventually(function()
      letter = publishing:get(app .. ".dead")
      return letter
    end)
    assert.equal("poison", letter.body)
    assert.same({ "permanent", "spoilt" }, { letter.headers["moonrabbit-reason"], letter.headers["moonrabbit-error"] })
    letter:ack()
    for _, each in ipairs { "home", "orphans", "wait.200ms" } do names[#names + 1] = app .. "." .. each end
  end)

  it("brings retries home to a queue that somebody has deleted meanwhile, and that is there again", function()
    local app, queue, seen = name "app", name "q", {}
    ladder_of(app)
    start {
      name = app, queues = { [queue] = {} },
      consumers = {
        { queue = queue, retry = retry.steps { 0.2 }, handler = function(msg)
          seen[#seen + 1] = msg.body
          if #seen == 1 then return nil, "once" end
        end },
      },
    }
    local other = broker.ok(broker.connect():channel())
    broker.ok(other:queue_delete(queue))
    broker.eventually(function()
      local channel = broker.ok(broker.connect():channel())
      local found = channel:queue_declare(queue, { passive = true })
      return found and found.consumer_count == 1
    end, 20, "it consumes again")
    broker.ok(publishing:publish("x", { routing_key = queue }))
    broker.eventually(function() return #seen == 2 end, 20, "it came home")
    assert.equal(0, declared(app .. ".orphans").message_count)
  end)

  it("sends messages on, and acks them only then", function()
    local queue, other = name "q", name "other"
    start {
      name = name "app", queues = { [queue] = {}, [other] = {} },
      consumers = { { queue = queue, route = route.forward("", other) } },
    }
    broker.ok(publishing:publish("on", { routing_key = queue, headers = { a = 1 }, message_id = "m" }))
    local got
    broker.eventually(function()
      got = publishing:get(other)
      return got
    end)
    assert.same({ "on", 1, "m" }, { got.body, got.headers.a, got.properties.message_id })
    got:ack()
  end)

  it("acks only what has arrived where its route sends it", function()
    local app, queue, good, full, exchange = name "app", name "q", name "good", name "full", name "x"
    ladder_of(app)
    local function make(msg) return "made of " .. msg.body end
    start {
      name = app, exchanges = { [exchange] = { type = "direct" } },
      queues = { [queue] = {}, [good] = { bind = { { exchange, "good" } } },
        [full] = { bind = { { exchange, "full" } },
          arguments = { ["x-max-length"] = 0, ["x-overflow"] = "reject-publish" } } },
      consumers = {
        { queue = queue, concurrency = 1, route = route.first {
          route.key(queue, route.first {
            route.header({ to = "good" }, { route.forward(exchange, "good"), route.publish(exchange, "good", make) }),
            route.header({ to = "nowhere" }, { route.forward(exchange, "good"), route.forward(exchange, "nowhere") }),
            route.header({ to = "full" }, route.publish(exchange, "full", make)),
            route.header({ to = "missing" }, route.forward(app .. ".missing", "x")),
          }),
        } },
      },
    }
    for _, to in ipairs { "good", "nowhere", "full", "missing" } do
      broker.ok(publishing:publish(to, { routing_key = queue, headers = { to = to } }))
    end
    broker.eventually(function() return declared(app .. ".dead").message_count == 3 end, 20)
    local errors = {}
    for _ = 1, 3 do
      local letter = broker.ok(publishing:get(app .. ".dead"))
      errors[letter.body] = letter.headers["moonrabbit-error"]
      letter:ack()
    end
    assert.matches("no queue takes", errors.nowhere)
    assert.matches("refused", errors.full)
    assert.matches("404", errors.missing)
    assert.same({ good = 1, ["made of good"] = 1, nowhere = 1 }, drained(good))
    assert.same({}, drained(full))
    assert.equal(0, declared(queue).message_count)
    broker.ok(publishing:publish("good", { routing_key = queue, headers = { to = "good" } })) -- the channel is back
    broker.eventually(function() return declared(good).message_count == 2 end)
  end)

  it("retries in the process what comes from a stream or an exclusive queue, and declares no ladder", function()
    for _, kind in ipairs { { type = "stream" }, { exclusive = true } } do
      local app, queue, attempts, done = name "app", name "q", {}, nil
      ladder_of(app)
      start {
        name = app, queues = { [queue] = kind },
        observer = { settled = function(_, outcome) if outcome == "ok" then done = true end end },
        consumers = {
          { queue = queue, retry = retry.steps { 0.2, 0.2 },
            arguments = kind.type and { ["x-stream-offset"] = "first" } or nil,
            handler = function(msg)
              attempts[#attempts + 1] = msg.routing_key
              if #attempts < 3 then return nil, "not yet" end
            end },
        },
      }
      broker.ok(publishing:publish("x", { routing_key = queue }))
      broker.eventually(function() return done end)
      assert.same({ queue, queue, queue }, attempts)
      local channel = broker.ok(broker.connect():channel())
      local none, err = channel:exchange_declare(app .. ".home", { passive = true })
      assert.is_nil(none)
      assert.equal(404, err.code)
      running:stop(5)
    end
  end)

  it("waits in the process, and parks without a word, where the headers have no room for more", function()
    local app, queue, runs = name "app", name "q", {}
    ladder_of(app)
    local conn = function() return broker.connect { frame_max = 8192 } end
    running = mr.app {
      name = app, queues = { [queue] = { type = "quorum" } }, log = function() end,
      consumers = { { queue = queue, retry = retry.steps { 0.2 }, handler = function(msg)
        runs[#runs + 1] = msg.redelivered
        return nil, "no"
      end } },
    }
    broker.ok(running:start { consume = conn(), publish = conn() })
    publishing = broker.ok(conn():channel { confirm = true })
    broker.ok(publishing:publish("x", { routing_key = queue, headers = { big = ("x"):rep(8080) } }))
    broker.eventually(function() return declared(app .. ".dead").message_count == 1 end)
    assert.same({ false, false }, runs)
    local letter = broker.ok(publishing:get(app .. ".dead"))
    assert.equal(8080, #letter.headers.big)
    letter:ack()
  end)

  it("throws what is wrong with its connections, and can be started again", function()
    local queue = name "q"
    running = mr.app { name = name "app", queues = { [queue] = {} }, log = function() end,
      consumers = { { queue = queue, handler = function() end } } }
    assert.error_matches(function() running:start { uri = broker.url, hearbeat = 5 } end, "did you mean 'heartbeat'")
    assert.equal("ready", running.state)
    broker.ok(running:start(connections()))
    assert.equal("running", running.state)
  end)

  it("filters duplicates", function()
    local queue, seen, outcomes = name "q", 0, {}
    start {
      name = name "app", queues = { [queue] = {} },
      observer = { settled = function(_, outcome) outcomes[outcome] = (outcomes[outcome] or 0) + 1 end },
      consumers = {
        { queue = queue, dedupe = mr.dedupe.memory { ttl = 60 }, handler = function() seen = seen + 1 end },
      },
    }
    for _ = 1, 3 do broker.ok(publishing:publish("x", { routing_key = queue, message_id = "same" })) end
    broker.eventually(function() return outcomes.duplicate == 2 end)
    assert.equal(1, seen)
    assert.equal(1, outcomes.ok)
  end)

  it("is left alone by a handler that acks its message twice", function()
    local queue, outcomes = name "q", {}
    start {
      name = name "app", queues = { [queue] = {} },
      observer = { settled = function(_, o) outcomes[#outcomes + 1] = o end },
      consumers = { { queue = queue, handler = function(msg)
        msg:ack()
        msg:ack()
      end } },
    }
    broker.ok(publishing:publish("x", { routing_key = queue }))
    broker.eventually(function() return outcomes[1] end)
    assert.same({ "drop" }, outcomes)
    -- A second ack would have closed the channel before this is answered.
    broker.ok(running._consumers[1].channel:queue_declare(queue, { passive = true }))
  end)

  it("handles batches, and acks and retries their messages one by one", function()
    local queue, sizes, outcomes = name "q", {}, {}
    start {
      name = name "app", queues = { [queue] = {} },
      observer = { settled = function(_, outcome) outcomes[outcome] = (outcomes[outcome] or 0) + 1 end },
      consumers = {
        { queue = queue, batch = { size = 4, wait = 1 }, in_process = true,
          retry = retry.constant { delay = 0.05, attempts = 5 },
          handler = function(list)
            sizes[#sizes + 1] = #list
            local results = {}
            for i, msg in ipairs(list) do
              if msg.body == "3" and #sizes == 1 then results[i] = "not yet" end
            end
            return results
          end },
      },
    }
    for i = 1, 6 do broker.ok(publishing:publish_async(tostring(i), { routing_key = queue })) end
    broker.ok(publishing:wait_for_confirms(10))
    broker.eventually(function() return outcomes.ok == 6 end)
    assert.equal(4, sizes[1])
    assert.equal(1, outcomes.retry)
  end)

  it("keeps the order of each key, retries included", function()
    local queue, seen, failed = name "q", {}, false
    start {
      name = name "app", queues = { [queue] = {} },
      consumers = {
        { queue = queue, order_by = function(msg) return msg.headers.k end,
          retry = retry.constant { delay = 0.05, attempts = 5 },
          handler = function(msg)
            mr.sleep(0.001)
            if msg.body == "a2" and not failed then
              failed = true
              return nil, "not yet"
            end
            local k = msg.headers.k
            seen[k] = (seen[k] or "") .. msg.body:sub(2)
          end },
      },
    }
    for i = 1, 9 do
      for _, k in ipairs { "a", "b" } do
        broker.ok(publishing:publish(k .. i, { routing_key = queue, headers = { k = k } }))
      end
    end
    broker.eventually(function() return seen.a and seen.b and #seen.a == 9 and #seen.b == 9 end)
    assert.same({ a = "123456789", b = "123456789" }, seen)
  end)

  it("goes on after its connections were lost", function()
    if broker.not_ours() then return end
    local queue, seen = name "q", {}
    start {
      name = name "app", queues = { [queue] = {} }, observer = {},
      consumers = { { queue = queue, timeout = 30, handler = function(msg)
        if msg.body == "during" and not msg.redelivered then mr.sleep(60) end -- cut off in the middle
        seen[msg.body] = true
      end } },
    }
    broker.ok(publishing:publish("before", { routing_key = queue }))
    broker.ok(publishing:publish("during", { routing_key = queue }))
    broker.eventually(function() return seen.before and running.runners[1].in_flight == 1 end)
    broker.ctl("close_all_connections", "because of a spec")
    broker.eventually(function() return seen.during end, 20)
    publishing = broker.ok(broker.connect():channel { confirm = true })
    broker.ok(publishing:publish("after", { routing_key = queue }))
    broker.eventually(function() return seen.after end, 20)
    assert.equal("running", running.state)
    broker.eventually(function() return running:publish("again", { routing_key = queue }) end, 20)
    broker.eventually(function() return seen.again end, 20)
    running:stop(0.1)
  end)

  it("stops within its deadline, and what is not done goes back", function()
    local queue, began = name "q", false
    start {
      name = name "app", queues = { [queue] = {} },
      consumers = { { queue = queue, handler = function()
        began = true
        mr.sleep(60)
      end } },
    }
    broker.ok(publishing:publish("x", { routing_key = queue }))
    broker.eventually(function() return began end)
    local ok, err = running:stop(0.1)
    assert.is_nil(ok)
    assert.equal("timeout", err.kind)
    broker.eventually(function() return declared(queue).message_count == 1 end)
  end)

  it("leaves nothing running when it cannot start", function()
    local queue = name "q"
    local app = mr.app {
      name = name "app", queues = { [queue] = { passive = true } }, log = function() end,
      consumers = { { queue = queue, handler = function() end } },
    }
    local ok, err = app:start(broker.url)
    assert.is_nil(ok)
    assert.equal(404, err.code)
    assert.truthy(err.message:find(queue, 1, true))
    assert.equal("stopped", app.state)
  end)

  it("runs until it is stopped", function()
    local queue = name "q"
    local app = mr.app {
      name = name "app", queues = { [queue] = { auto_delete = true } }, connect = broker.url,
      consumers = { { queue = queue, handler = function() end } },
    }
    mr.spawn(function()
      while app.state ~= "running" do mr.sleep(0.01) end
      app:stop(5)
    end)
    assert.is_true(app:run())
  end)

  it("wants two connections", function()
    local conn = broker.connect()
    local app = mr.app { name = "x", queues = { q = {} }, consumers = { { queue = "q", handler = function() end } } }
    assert.has_error(function() app:start { consume = conn, publish = conn } end)
  end)

  it("routes a retry, and a replay, by the key that the message was published with", function()
    local exchange, queue, other = name "x", name "q", name "other"
    local app = name "app"
    local seen, forwarded = {}, nil
    start {
      name = app, exchanges = { [exchange] = { type = "topic" } },
      queues = { [queue] = { bind = { { exchange, "order.#" } } }, [other] = { bind = { { exchange, "moved.#" } } } },
      consumers = {
        { queue = queue, retry = retry.constant { delay = 0.2, attempts = 3 }, route = route.first {
          route.key("order.*.created", function(msg)
            seen[#seen + 1] = msg.routing_key
            if #seen == 1 then error "once" end
            return running:forward(msg, "", other)
          end),
        } },
        { queue = other, route = route.first { route.otherwise(function(msg) forwarded = msg.headers end) } },
      },
    }
    for _, each in ipairs { ".home", ".orphans", ".wait.200ms", ".dead" } do names[#names + 1] = app .. each end
    local opts = { exchange = exchange, routing_key = "order.eu.created", headers = { mine = 1 } }
    broker.ok(publishing:publish("1", opts))
    broker.eventually(function() return forwarded end, 20, "it came through")
    assert.same({ "order.eu.created", queue }, seen)
    assert.same({ mine = 1 }, forwarded)
    assert.equal(0, declared(app .. ".dead").message_count)
  end)
end)
