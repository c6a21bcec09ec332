-- Connections that are lost and come back: a proxy cuts the line, the broker closes it, or names change.
local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local broker = require "support.broker"
local ports = require "support.ports"
local proxy = require "support.proxy"
local ok, unique, eventually = broker.ok, broker.unique, broker.eventually

describe("a connection that survives", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  local through, conn, seen

  local function connect(opts)
    local all = { log = function() end, reconnect = { first = 0.01, max = 0.2 } }
    for key, value in pairs(opts or {}) do all[key] = value end
    if not all.endpoints then all.uri = all.uri or broker.uri { host = "127.0.0.1", port = through.port } end
    conn = broker.connect(all)
    seen = { states = {} }
    conn:on("state", function(state) table.insert(seen.states, state) end)
    conn:on("recovered", function() seen.recovered = (seen.recovered or 0) + 1 end)
    conn:on("recovering", function(err, attempt, delay)
      seen.recovering = { err = err, attempt = attempt, delay = delay }
    end)
    conn:on("recovery_error", function(entity, err) table.insert(seen, { entity, err }) end)
    return conn
  end

  local function recovered(n) eventually(function() return seen.recovered == (n or 1) end, 15, "recovered") end

  local function cut(n)
    through:cut()
    recovered(n)
  end

  before_each(function() through = proxy.start(broker.parsed().host, broker.parsed().port) end)
  after_each(function()
    broker.close_all()
    through:stop()
  end)

  -- What another connection sees.
  local function outside(fn)
    local other = broker.connect { reconnect = false }
    local a, b = fn(ok(other:channel { confirm = true }), other)
    other:close(5)
    return a, b
  end

  local function exists(queue)
    return outside(function(ch)
      local found, err = ch:queue_declare(queue, { passive = true })
      return found ~= nil or err.code == 405
    end)
  end

  it("keeps its channel and consumer, and tells what happens", function()
    connect()
    local ch = ok(conn:channel { confirm = true, prefetch = 7 })
    local queue = unique "survives"
    ok(ch:queue_declare(queue, { exclusive = true }))
    local consumer = ok(ch:consume(queue, { tag = "mine", arguments = { ["x-priority"] = 3 } }))
    local why
    conn:on("consumer_recovered", function(which, err) why = { which, err } end)
    ok(ch:publish("one", { routing_key = queue }))
    local first = ok(consumer:receive(5))
    cut()
    assert.equal("open", (conn:state()))
    assert.same({ "recovering", "open" }, seen.states)
    assert.equal(1, seen.recovering.attempt)
    assert.truthy(seen.recovering.delay < 0.02)
    assert.equal("closed", seen.recovering.err.kind)
    eventually(function() return why end)
    assert.equal(consumer, why[1])
    assert.is_true(ch:is_open())
    -- The message of before: harmless, whatever is done with it.
    for _, settle in ipairs { "ack", "nack", "reject" } do
      local done, err = first[settle](first)
      assert.is_nil(done)
      assert.equal("closed", err.kind)
    end
    ok(ch:publish("two", { routing_key = queue }))
    local second = ok(consumer:receive(5))
    assert.equal("two", second.body)
    assert.equal("mine", second.consumer_tag)
    assert.is_true(second:ack())
    assert.equal(7, consumer.prefetch)
  end)

  it("declares again what went, in order, and not what was deleted, unbound or left out", function()
    connect { recover = { filter = function(kind, entity)
      return not (kind == "queue" and entity.name:find "unwanted")
    end } }
    local ch = ok(conn:channel { confirm = true })
    local from, to, gone = unique "from", unique "to", unique "gone"
    local kept, deleted, unwanted = unique "kept", unique "deleted", unique "unwanted"
    ok(ch:exchange_declare(from, { type = "headers", durable = true }))
    ok(ch:exchange_declare(to, { type = "topic", auto_delete = true }))
    ok(ch:exchange_declare(gone, { type = "fanout" }))
    ok(ch:exchange_bind(to, from, "", { arguments = { kind = "a", ["x-match"] = "all" } }))
    for _, queue in ipairs { kept, deleted, unwanted } do
      ok(ch:queue_declare(queue, { arguments = { ["x-max-length"] = 100 } }))
    end
    ok(ch:queue_bind(kept, to, "#"))
    ok(ch:queue_bind(kept, "amq.direct", "one"))
    ok(ch:queue_bind(kept, "amq.direct", "two"))
    ok(ch:queue_bind(kept, "amq.direct", "two", { arguments = { x = 1 } }))
    ok(ch:queue_declare("amq.never", { passive = true })
      or (function() ch = ok(conn:channel { confirm = true }) return true end)())
    ok(ch:queue_unbind(kept, "amq.direct", "two"))
    ok(ch:queue_delete(deleted))
    ok(ch:exchange_delete(gone))
    local record = conn._record
    assert.is_nil(record.queues["amq.never"])
    -- Everything goes while the connection is away.
    through.held = true
    through:cut()
    eventually(function() return (conn:state()) == "recovering" end)
    outside(function(other)
      for _, queue in ipairs { kept, unwanted } do ok(other:queue_delete(queue)) end
      ok(other:exchange_delete(from))
      return true
    end)
    through.held = false
    recovered()
    assert.same({}, { seen[1] and tostring(seen[1][2]) })
    ok(ch:publish("x", { exchange = from, headers = { kind = "a" } }))
    ok(ch:publish("x", { exchange = "amq.direct", routing_key = "one" }))
    ok(ch:publish("x", { exchange = "amq.direct", routing_key = "two" })) -- by the binding with arguments
    assert.equal(3, ok(ch:queue_declare(kept, { passive = true })).message_count)
    assert.is_false(exists(deleted))
    assert.is_false(exists(unwanted))
    ok(ch:queue_unbind(kept, "amq.direct", "two", { arguments = { x = 1 } }))
    local sent, err = ch:publish("x", { exchange = "amq.direct", routing_key = "two" })
    assert.is_nil(sent)
    assert.equal("unroutable", err.kind)
    ok(ch:queue_delete(kept))
    ok(ch:exchange_delete(from))
    assert.is_nil(next(record.bindings))
    assert.is_nil(next(record.queues) == unwanted and next(record.queues, unwanted) or nil)
    assert.is_nil(record.exchanges[to]) -- auto-delete, and nothing is bound to it any more
  end)

  it("gives a queue that the broker names its new name everywhere", function()
    connect()
    local ch = ok(conn:channel { confirm = true })
    local old = ok(ch:queue_declare("", { exclusive = true })).queue
    ok(ch:queue_bind("", "amq.topic", "news.#"))
    ok(ch:queue_bind(old, "amq.direct", old))
    local consumer = ok(ch:consume(""))
    assert.equal(old, consumer.queue)
    local names
    conn:on("queue_renamed", function(from, to) names = { from, to } end)
    cut()
    eventually(function() return names end)
    local new = consumer.queue
    assert.not_equal(old, new)
    assert.same({ old, new }, names)
    ok(ch:publish("a", { exchange = "amq.topic", routing_key = "news.moon" }))
    ok(ch:publish("b", { exchange = "amq.direct", routing_key = new }))
    assert.equal("a", ok(consumer:receive(5)).body)
    assert.equal("b", ok(consumer:receive(5)).body)
    ok(ch:queue_bind("", "amq.fanout"))
    cut(2)
    ok(ch:publish("c", { exchange = "amq.fanout" }))
    assert.equal("c", ok(consumer:receive(5)).body)
    assert.equal(1, (function() local n = 0 for _ in pairs(conn._record.queues) do n = n + 1 end return n end)())
  end)

  it("keeps a server-named queue that outlived the connection, with what is in it", function()
    connect()
    local ch = ok(conn:channel { confirm = true })
    local queue = ok(ch:queue_declare("", {})).queue
    ok(ch:publish("precious", { routing_key = queue }))
    cut()
    assert.equal("precious", ok(ch:get(queue, { no_ack = true })).body)
    -- And one that did not gets another name.
    local consumer = ok(ch:consume(queue))
    outside(function(other) return ok(other:queue_delete(queue)) end)
    eventually(function() return consumer.queue ~= queue and not consumer._down end, 10)
    ok(ch:publish("again", { routing_key = consumer.queue }))
    assert.equal("again", ok(consumer:receive(5)).body)
    ok(ch:queue_delete(consumer.queue))
  end)

  it("forgets an auto-delete queue with its last consumer, not before", function()
    connect()
    local ch = ok(conn:channel())
    local queue = unique "auto"
    ok(ch:queue_declare(queue, { auto_delete = true }))
    ok(ch:queue_bind(queue, "amq.fanout"))
    local one, two = ok(ch:consume(queue)), ok(ok(conn:channel()):consume(queue))
    ok(one:cancel())
    cut()
    eventually(function() return exists(queue) end)
    ok(two.channel:close())
    assert.is_nil(conn._record.queues[queue])
    assert.is_nil(next(conn._record.bindings))
    cut(2)
    assert.is_false(exists(queue))
  end)

  it("restores confirms, prefetch and transactions", function()
    connect()
    local confirmed = ok(conn:channel { confirm = true, prefetch = 3, window = 2 })
    local tx = ok(conn:channel())
    ok(tx:tx_select())
    ok(tx:qos(9, { global = true }))
    local queue = ok(confirmed:queue_declare("", { exclusive = true })).queue
    local consumer = ok(confirmed:consume(queue, { prefetch = 2 }))
    local ordinary = ok(conn:channel { prefetch = 4 })
    local other = ok(ordinary:consume(ok(ordinary:queue_declare("", { exclusive = true })).queue))
    cut()
    for i = 1, 8 do ok(confirmed:publish("o" .. i, { routing_key = other.queue })) end
    queue = consumer.queue
    for i = 1, 5 do ok(confirmed:publish("m" .. i, { routing_key = queue })) end
    eventually(function() return consumer:buffered() == 2 and other:buffered() >= 4 end)
    moonrabbit.sleep(0.05)
    assert.same({ 2, 4 }, { consumer:buffered(), other:buffered() })
    ok(tx:publish("held", { routing_key = queue }))
    ok(tx:tx_rollback())
    assert.equal(3, ok(confirmed:queue_declare(queue, { passive = true })).message_count)
    local full = { ok(confirmed:publish_async("a", { routing_key = queue })),
      ok(confirmed:publish_async("b", { routing_key = queue })) }
    local sent, err = confirmed:publish_async("c", { routing_key = queue, timeout = 0 })
    assert.is_nil(sent)
    assert.equal("overflow", err.kind)
    ok(full[1]:wait(5))
  end)

  it("reports a declaration that the broker contradicts, with both sides, and restores the rest", function()
    connect()
    local ch = ok(conn:channel { confirm = true })
    local changed, fine = unique "changed", unique "fine"
    ok(ch:queue_declare(changed, { arguments = { ["x-max-length"] = 10 } }))
    ok(ch:queue_declare(fine, { exclusive = true }))
    ok(ch:queue_bind(changed, "amq.direct", changed))
    ok(ch:queue_bind(fine, "amq.direct", fine))
    local consumer = ok(ch:consume(changed))
    through.held = true
    through:cut()
    eventually(function() return (conn:state()) == "recovering" end)
    outside(function(other)
      ok(other:queue_delete(changed))
      return ok(other:queue_declare(changed, { arguments = { ["x-max-length"] = 20 } }))
    end)
    through.held = false
    recovered()
    eventually(function() return seen[1] end)
    local entity, err = seen[1][1], seen[1][2]
    assert.equal("queue", entity.kind)
    assert.equal(changed, entity.name)
    assert.equal(10, entity.arguments["x-max-length"])
    assert.equal(406, err.code)
    assert.matches("20", err.message)
    assert.matches("10", err.message)
    -- It is there, though another one: its binding and its consumer are restored, and so is the other.
    for _, key in ipairs { changed, fine } do ok(ch:publish("x", { exchange = "amq.direct", routing_key = key })) end
    assert.equal("x", ok(consumer:receive(5)).body)
    assert.equal(1, #seen)
    -- It is tried again: once the contradiction is gone, all is well.
    outside(function(other) return ok(other:queue_delete(changed)) end)
    eventually(function() return not conn._record.queues[changed].failure and not consumer._down end, 10)
    ok(ch:publish("y", { routing_key = changed }))
    assert.equal("y", ok(consumer:receive(5)).body)
    ok(ch:queue_delete(changed))
  end)

  it("gets an exclusive queue back although another connection holds it for a while", function()
    connect()
    local ch = ok(conn:channel { confirm = true })
    local queue = unique "mine"
    ok(ch:queue_declare(queue, { exclusive = true }))
    local consumer = ok(ch:consume(queue))
    through.held = true
    through:cut()
    eventually(function() return (conn:state()) == "recovering" end)
    local holder = broker.connect { reconnect = false }
    eventually(function() return ok(holder:channel()):queue_declare(queue, { exclusive = true }) end)
    through.held = false
    recovered()
    eventually(function() return seen[1] end)
    assert.equal(405, seen[1][2].code)
    ok(holder:close(5))
    eventually(function() return not consumer._down end, 10)
    ok(ch:publish("x", { routing_key = queue }))
    assert.equal("x", ok(consumer:receive(5)).body)
  end)

  describe("its consumers", function()
    local ch, queue

    before_each(function()
      connect()
      ch = ok(conn:channel { confirm = true, prefetch = 10 })
      queue = unique "consumed"
      ok(ch:queue_declare(queue, {}))
    end)
    after_each(function()
      if conn:is_open() then ok(conn:channel()):queue_delete(queue) end
    end)

    local function flows(consumer, channel)
      ok((channel or ch):publish("flows", { routing_key = queue }))
      local message = ok(consumer:receive(10))
      assert.equal("flows", message.body)
      assert.is_true(message:ack())
    end

    it("come back when somebody deletes the queue, which is declared again", function()
      local consumer = ok(ch:consume(queue))
      local cancelled, back
      ch:on("cancel", function(which) cancelled = which end)
      conn:on("consumer_recovered", function(_, why) back = why end)
      outside(function(other) return ok(other:queue_delete(queue)) end)
      eventually(function() return back end)
      assert.equal(consumer, cancelled)
      assert.equal("cancelled", back.kind)
      assert.is_nil(consumer:reason())
      flows(consumer)
    end)

    it("wait for a queue that is not ours to come back", function()
      local foreign = unique "foreign"
      outside(function(other) return ok(other:queue_declare(foreign, {})) end)
      local consumer = ok(ch:consume(foreign))
      outside(function(other) return ok(other:queue_delete(foreign)) end)
      eventually(function() return seen[1] end)
      assert.equal("consumer", seen[1][1].kind)
      assert.equal(404, seen[1][2].code)
      assert.is_true(ch:is_open())
      outside(function(other)
        ok(other:queue_declare(foreign, {}))
        return ok(other:publish("x", { routing_key = foreign }))
      end)
      local message = ok(consumer:receive(10))
      assert.is_true(message:ack())
      ok(ch:queue_delete(foreign))
      -- Deleted over this connection: it has ended.
      local none, err = consumer:receive(10)
      assert.is_nil(none)
      assert.equal("cancelled", err.kind)
    end)

    it("come back when the broker closes their channel for another's mistake", function()
      local consumer = ok(ch:consume(queue))
      local message = (function() ok(ch:publish("held", { routing_key = queue })) return ok(consumer:receive(5)) end)()
      local lost, back
      ch:on("lost", function(err) lost = err end)
      ch:on("recovered", function() back = true end)
      local none, err = ch:queue_declare(unique "no-such", { passive = true })
      assert.is_nil(none)
      assert.equal("channel", err.kind)
      assert.equal(404, err.code)
      none, err = ch:queue_declare(unique "other", { exclusive = true })
      assert.is_nil(none)
      assert.equal("closed", err.kind)
      assert.is_true(err.temporary)
      local acked
      acked, err = message:ack()
      assert.is_nil(acked)
      assert.equal("closed", err.kind)
      local again = ok(consumer:receive(10))
      assert.equal("held", again.body)
      assert.is_true(again.redelivered)
      assert.is_true(again:ack())
      eventually(function() return lost and back end)
      assert.equal(404, lost.code)
      flows(consumer)
      assert.is_true(conn:is_open())
      assert.is_nil(seen.recovered)
    end)

    it("come back when they settle what the broker does not know (406)", function()
      local consumer = ok(ch:consume(queue))
      -- Past this side's own check.
      ch._core:call("basic.qos", { prefetch_count = 5 })
      ch._session:expect(ch._calls, "basic.qos").abandoned = true
      local other = ok(conn:channel())
      local none, err = other:queue_declare(queue, { durable = true })
      assert.is_nil(none)
      assert.equal(406, err.code)
      assert.is_false(other:is_open()) -- nothing lives on it: it has ended
      none, err = ch:queue_declare(queue, { durable = true })
      assert.is_nil(none)
      assert.equal(406, err.code)
      flows(consumer, ok(conn:channel { confirm = true }))
      assert.equal(1, (function() local n = 0 for _ in pairs(conn._record.queues) do n = n + 1 end return n end)())
    end)

    it("go on in messages() and receive() across a reconnect, and handlers finish", function()
      local iterated = ok(ch:consume(queue))
      local bodies, handled, late = {}, {}, nil
      local hold, begun = true, false
      local work = unique "work"
      ok(ch:queue_declare(work, {}))
      ok(conn:consume(work, { concurrency = 4 }, function(message)
        if message.body == "slow" and not message.redelivered then
          begun = true
          while hold do moonrabbit.sleep(0.01) end
          late = { message:ack() }
        else
          handled[message.body] = message:ack()
        end
      end))
      moonrabbit.run(function()
        moonrabbit.spawn(function()
          while #bodies < 2 do
            local message = ok(iterated:receive())
            bodies[#bodies + 1] = message.body
            message:ack()
          end
        end)
        ok(ch:publish("1", { routing_key = queue }))
        ok(ch:publish("slow", { routing_key = work }))
        eventually(function() return #bodies == 1 and begun end)
        ok(ch:queue_declare(queue, { passive = true })) -- behind the ack: the broker has it
        cut()
        hold = false
        eventually(function() return late end)
        assert(late[1] == nil and late[2].kind == "closed")
        ok(ch:publish("2", { routing_key = queue }))
        ok(ch:publish("quick", { routing_key = work }))
        eventually(function() return #bodies == 2 and handled.quick and handled.slow end)
        assert(iterated:cancel())
      end)
      local rest = 0
      for _ in iterated:messages() do rest = rest + 1 end
      assert.equal(0, rest)
      ok(ch:queue_delete(work))
    end)

    it("are not started again when they were cancelled meanwhile", function()
      local mine, other = ok(ch:consume(queue)), ok(conn:consume(queue))
      through.held = true
      through:cut()
      eventually(function() return (conn:state()) == "recovering" end)
      assert.is_true(ok(mine:cancel()))
      assert.is_true(ok(other:cancel()))
      assert.is_true(ok(ch:close()))
      through.held = false
      recovered()
      assert.equal("cancelled", mine:reason().kind)
      -- The broker may still see those of the connection that was cut.
      outside(function(channel)
        eventually(function() return ok(channel:queue_declare(queue, { passive = true })).consumer_count == 0 end)
        return true
      end)
      assert.is_nil(next(conn._channels))
      ch = ok(conn:channel { confirm = true })
    end)

    it("that take no acks give what had arrived, before what comes later", function()
      local consumer = ok(ch:consume(queue, { no_ack = true }))
      for i = 1, 3 do ok(ch:publish("before" .. i, { routing_key = queue })) end
      eventually(function() return consumer:buffered() == 3 end)
      cut()
      ok(ch:publish("after", { routing_key = queue }))
      local bodies = {}
      for i = 1, 4 do bodies[i] = ok(consumer:receive(5)).body end
      assert.same({ "before1", "before2", "before3", "after" }, bodies)
    end)

    -- How often the broker looks whether an ack has taken it too long, and how long that is, in milliseconds.
    local function look_at_consumers(tick, patience)
      broker.ctl("eval", ("application:set_env(rabbit, channel_tick_interval, %d), "
        .. "application:set_env(rabbit, consumer_timeout, %d)."):format(tick, patience))
    end

    local function be_patient_again() look_at_consumers(60000, 1800000) end

    it("come back when the broker has waited too long for an ack", function()
      if not broker.name then pending "the broker is not ours" return end
      look_at_consumers(200, 2000) -- time enough to ack the second
      finally(be_patient_again)
      local slow = ok(conn:channel { confirm = true })
      local consumer = ok(slow:consume(queue, { prefetch = 1 }))
      ok(slow:publish("late", { routing_key = queue }))
      local message = ok(consumer:receive(5))
      local lost
      slow:on("lost", function(err) lost = err end)
      local again = ok(consumer:receive(20))
      assert.is_true(again:ack())
      assert.is_true(ok(slow:close()))
      assert.equal("late", again.body)
      eventually(function() return lost end)
      assert.equal(406, lost.code)
      local acked, err = message:ack()
      assert.is_nil(acked)
      assert.equal("closed", err.kind)
    end)

    -- RabbitMQ closes the channel at each look at its timeouts until it has our answer.
    it("come back alone, without the connection, when the loop stood still meanwhile", function()
      if not broker.name then pending "the broker is not ours" return end
      look_at_consumers(100, 300)
      finally(be_patient_again)
      local slow = ok(conn:channel { confirm = true })
      local consumer = ok(slow:consume(queue, { prefetch = 1 }))
      ok(slow:publish("late", { routing_key = queue }))
      ok(consumer:receive(5))
      os.execute "sleep 1.5"
      be_patient_again()
      local again = ok(consumer:receive(20))
      assert.equal("late", again.body)
      assert.is_true(again:ack())
      ok(conn:channel()):close()
      assert.is_nil(seen.recovered)
      assert.equal("open", (conn:state()))
      ok(slow:close())
    end)

    it("exclusive ones take over when the other lets go", function()
      local first = ok(ch:consume(queue, { exclusive = true }))
      through.held = true
      through:cut()
      eventually(function() return (conn:state()) == "recovering" end)
      local rival_conn = broker.connect { reconnect = false }
      local rival
      eventually(function() rival = ok(rival_conn:channel()):consume(queue, { exclusive = true }) return rival end)
      through.held = false
      recovered()
      eventually(function() return seen[1] end)
      assert.equal(403, seen[1][2].code)
      ok(rival:cancel())
      eventually(function() return not first._down and ch:is_open() end, 10)
      flows(first)
    end)
  end)

  it("leaves no channel open that was closed before it was opened again", function()
    connect { channel_max = 2 }
    local queue = unique "cancelled"
    local ch = ok(conn:channel())
    ok(ch:queue_declare(queue, { exclusive = true }))
    ok(ch:close())
    local consumer = ok(conn:consume(queue, { prefetch = 5 }))
    local none, err = consumer.channel:queue_declare(unique "missing", { passive = true })
    assert.is_nil(none)
    assert.equal(404, err.code)
    ok(consumer:cancel())
    eventually(function() return not conn._repairs.running end, 15, "nothing left to repair")
    ok(conn:channel())
    ok(conn:channel()) -- all that the broker allows
  end)

  it("goes on in a stream where it was", function()
    connect()
    local ch = ok(conn:channel { confirm = true, prefetch = 10 })
    local stream = unique "stream"
    ok(ch:queue_declare(stream, { durable = true, arguments = { ["x-queue-type"] = "stream" } }))
    for i = 1, 4 do ok(ch:publish("m" .. i, { routing_key = stream })) end
    local consumer = ok(ch:consume(stream, { arguments = { ["x-stream-offset"] = "first" } }))
    for i = 1, 2 do
      local message = ok(consumer:receive(10))
      assert.equal("m" .. i, message.body)
      message:ack()
    end
    cut()
    for i = 3, 4 do assert.equal("m" .. i, ok(consumer:receive(10)).body) end
    ok(ch:queue_delete(stream))
  end)

  it("ends every waiting call within its own timeout while it comes back", function()
    connect { reconnect = { first = 600 } }
    local ch = ok(conn:channel { confirm = true })
    local queue = unique "waits"
    ok(ch:queue_declare(queue, { exclusive = true }))
    local consumer = ok(ch:consume(queue))
    local publisher = ok(conn:channel { confirm = true })
    ok(publisher:publish_async("x", { routing_key = "none-such", mandatory = false }))
    ok(publisher:wait_for_confirms(5))
    through.silent = true
    local confirmation = ok(publisher:publish_async("lost", { routing_key = queue }))
    local results, waiting = {}, 0
    local function start(name, fn)
      waiting = waiting + 1
      moonrabbit.spawn(function()
        results[name] = { fn() }
        waiting = waiting - 1
      end)
    end
    local function all(when, seconds)
      local route = { routing_key = queue, timeout = seconds }
      start(when .. " publish", function() return publisher:publish("x", route) end)
      start(when .. " wait", function() return confirmation:wait(seconds) end)
      start(when .. " declare", function() return ch:queue_declare("x", { timeout = seconds }) end)
      start(when .. " get", function() return ch:get(queue, { timeout = seconds }) end)
      start(when .. " channel", function() return conn:channel { timeout = seconds } end)
      start(when .. " call", function() return conn:call("x", route) end)
      start(when .. " secret", function() return conn:update_secret("x", { timeout = seconds }) end)
    end
    moonrabbit.run(function()
      all("before", 5)
      start("confirms", function() return publisher:wait_for_confirms(5) end)
      moonrabbit.sleep(0.02)
      through:cut()
      eventually(function() return waiting == 0 end, 20)
      assert((conn:state()) == "recovering")
      all("after", 0.2)
      start("flush", function() return conn:flush(0.2) end)
      start("receive", function() return consumer:receive(0.05) end)
      start("open", function() return conn:wait_open(0.05) end)
      start("batch", function() return conn:batch(function() end) end)
      eventually(function() return waiting == 0 end, 5)
    end)
    for name, result in pairs(results) do
      assert.is_nil(result[1], name)
      local kind = (name == "receive" or name == "open") and "timeout" or "closed"
      assert.equal(kind, result[2].kind, name)
      assert.is_true(result[2].temporary, name)
    end
    assert.equal(2, results.confirms[2].pending)
    assert.equal("lost", confirmation:outcome())
    assert.equal(0, publisher:unconfirmed())
    assert.equal(0, publisher._waiters.count)
    -- And close works at once.
    local started = native.now()
    assert.is_true(ok(conn:close()))
    assert.truthy(native.now() - started < 10) -- the next attempt is 600 s away
    assert.equal("closed", (conn:state()))
    eventually(function() return #seen.states == 2 end)
    assert.same({ "recovering", "closed" }, seen.states)
    local none, err = consumer:receive()
    assert.is_nil(none)
    assert.equal("closed", err.kind)
    assert.is_false(err.temporary)
    assert.is_nil(next(conn._channels))
  end)

  it("ends every waiting call within its own timeout while the broker says nothing", function()
    connect { timeout = 60 }
    local ch, plain = ok(conn:channel { confirm = true }), ok(conn:channel())
    local queue = unique "silence"
    ok(ch:queue_declare(queue, { exclusive = true }))
    local consumer, other = ok(ch:consume(queue)), ok(ch:consume(queue))
    local narrow = ok(conn:publisher { routing_key = queue, max_kept = 1 })
    narrow.timeout = 0.2 -- not that of its start
    local publisher = ok(conn:publisher { routing_key = queue })
    local own = { timeout = 0.2 }
    local function publishing() return { routing_key = queue, timeout = 0.2 } end
    through.silent = true
    local confirmation, kept = ok(ch:publish_async("x", { routing_key = queue })), ok(narrow:send_async "x")
    local calls = {
      publish = function() return ch:publish("x", publishing()) end,
      ["Confirmation:wait"] = function() return confirmation:wait(0.2) end,
      wait_for_confirms = function() return ch:wait_for_confirms(0.2) end,
      queue_declare = function() return plain:queue_declare(queue, own) end,
      queue_bind = function() return plain:queue_bind(queue, "amq.fanout", "", own) end,
      qos = function() return plain:qos(5, own) end,
      get = function() return plain:get(queue, own) end,
      consume = function() return plain:consume(queue, own) end,
      cancel = function() return other:cancel(own) end,
      receive = function() return consumer:receive(0.2) end,
      channel = function() return conn:channel(own) end,
      publisher = function() return conn:publisher(own) end,
      call = function() return conn:call("x", publishing()) end,
      update_secret = function() return conn:update_secret("x", own) end,
      ["Publisher:send"] = function() return publisher:send("x", own) end,
      ["Publisher:send_async"] = function() return narrow:send_async "y" end,
      ["Publisher:wait"] = function() return narrow:wait(0.2) end,
      ["the Confirmation of a Publisher"] = function() return kept:wait(0.2) end,
    }
    local results, left = {}, 0
    local function start(name, fn)
      left = left + 1
      moonrabbit.spawn(function()
        local started = native.now()
        local value, err = fn()
        results[name] = { value = value, err = err, took = native.now() - started }
        left = left - 1
      end)
    end
    moonrabbit.run(function()
      for name, fn in pairs(calls) do start(name, fn) end
      eventually(function() return left == 0 end, 10, "all calls end")
      start("Channel:close", function() return plain:close(0.2) end)
      eventually(function() return left == 0 end, 10, "close of a channel ends")
      start("Connection:close", function() return conn:close(0.2) end)
      eventually(function() return left == 0 end, 10, "close ends")
    end)
    for name, result in pairs(results) do
      assert.is_nil(result.value, name)
      assert.equal(name == "Publisher:send_async" and "overflow" or "timeout", result.err.kind, name)
      assert.truthy(result.took > 0.19 and result.took < 3, name .. ": " .. result.took)
    end
  end)

  it("tells of lost publishes once, and publishes again on the same channel", function()
    connect()
    local ch = ok(conn:channel { confirm = true })
    local queue = unique "again"
    ok(ch:queue_declare(queue, {})) -- the broker may hold an exclusive one for the lost connection for a moment
    through.silent = true
    local confirmation = ok(ch:publish_async("lost", { routing_key = queue }))
    through.held = true
    moonrabbit.sleep(0.01)
    through.silent = false
    through.held = false
    cut()
    local confirmed, err = confirmation:wait(1)
    assert.is_nil(confirmed)
    assert.equal("closed", err.kind)
    confirmed, err = ch:wait_for_confirms(1)
    assert.is_nil(confirmed)
    assert.equal(1, err.pending)
    assert.is_true(ok(ch:wait_for_confirms(1)))
    ok(ch:publish("x", { routing_key = queue }))
    assert.is_true(ok(ch:wait_for_confirms(1)))
    ok(ch:queue_delete(queue))
  end)

  it("calls again after a reconnect, and ends those in flight", function()
    connect()
    local queue = unique "rpc"
    local server = broker.connect { reconnect = false }
    local answers = ok(server:channel())
    ok(answers:queue_declare(queue, { exclusive = true }))
    ok(answers:consume(queue, function(message)
      if message.body ~= "silence" then message:reply("re " .. message.body) end
      message:ack()
    end))
    assert.equal("re one", ok(conn:call("one", { routing_key = queue })).body)
    local result
    moonrabbit.run(function()
      moonrabbit.spawn(function() result = { conn:call("silence", { routing_key = queue }) } end)
      moonrabbit.sleep(0.05)
      cut()
      eventually(function() return result end)
    end)
    assert.is_nil(result[1])
    assert.equal("closed", result[2].kind)
    assert.equal("re two", ok(conn:call("two", { routing_key = queue })).body)
    assert.is_nil(next(conn._rpc._replies.by_id))
  end)

  it("tells its watchers that a channel is gone and that it is back, before the user", function()
    connect()
    local ch = ok(conn:channel { confirm = true })
    local order = {}
    local off = ch:_watch {
      lost = function(err) table.insert(order, "lost " .. err.kind .. " " .. ch:unconfirmed()) end,
      recovered = function() table.insert(order, "recovered " .. tostring(ch:is_open())) end,
      ended = function(err) table.insert(order, "ended " .. tostring(err.temporary)) end,
    }
    ch:on("recovered", function() table.insert(order, "user") end)
    cut()
    eventually(function() return #order == 3 end)
    assert.same({ "lost closed 0", "recovered true", "user" }, order)
    -- Watched, it comes back from an error too.
    ch:queue_declare(unique "no-such", { passive = true })
    eventually(function() return #order == 6 end)
    assert.equal("lost channel 0", order[4])
    off()
    ch:_watch { ended = function(err) table.insert(order, "ended " .. tostring(err.temporary)) end }
    ok(ch:close())
    assert.equal("ended false", order[7])
  end)

  it("logs in with the secret that the broker was told last, and asks a password function anew", function()
    connect()
    conn:update_secret "changed" -- whether or not this broker takes it
    conn._secrets[conn._target.user] = "surely wrong"
    through:cut()
    eventually(function() return (conn:state()) == "closed" end)
    local _, reason = conn:state()
    assert.equal("auth", reason.kind)
    assert.is_nil(tostring(reason):find("surely", 1, true))
    local asked = 0
    connect { password = function()
      asked = asked + 1
      return broker.parsed().password or "guest"
    end }
    cut()
    assert.equal(2, asked)
  end)

  it("ends at once by an error that is permanent, and gives up after so many attempts", function()
    connect { reconnect = { first = 0.01, max = 0.02, attempts = 3 } }
    local ch = ok(conn:channel())
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    local consumer = ok(ch:consume(queue))
    through.held = true
    through:cut()
    local none, err = consumer:receive(10)
    assert.is_nil(none)
    assert.equal("closed", err.kind)
    assert.equal("closed", (conn:state()))
    eventually(function() return seen.states[2] end)
    assert.equal(3, seen.recovering.attempt)
    through.held = false
    if not broker.name then return end
    local user = unique "user"
    broker.ctl("add_user", user, "pass-of-user")
    broker.ctl("set_permissions", user, ".*", ".*", ".*")
    connect { uri = broker.uri { host = "127.0.0.1", port = through.port, user = user, password = "pass-of-user" } }
    broker.ctl("change_password", user, "another")
    through:cut()
    eventually(function() return (conn:state()) == "closed" end)
    local _, reason = conn:state()
    assert.equal("auth", reason.kind)
    assert.is_false(reason.temporary)
    assert.equal(1, seen.recovering.attempt)
    broker.ctl("delete_user", user)
  end)

  it("goes on at an endpoint that takes it, though others refuse, are dead or know another password", function()
    connect { endpoints = {
      broker.uri { host = "127.0.0.1", port = through.port }, "amqp://127.0.0.1:1/", "amqp://no-such-host.invalid/",
      broker.uri { password = "wrong" }, broker.uri {},
    } }
    through:stop()
    recovered()
    assert.equal(broker.parsed().host .. ":" .. broker.parsed().port, conn.endpoint)
    through = proxy.start(broker.parsed().host, broker.parsed().port)
  end)

  it("keeps trying at the first connect where it is told to", function()
    local port = ports.free() -- nobody takes it meanwhile
    local refused, err = moonrabbit.connect { uri = broker.uri { host = "127.0.0.1", port = port } }
    assert.is_nil(refused)
    assert.equal("refused", err.kind)
    refused, err = moonrabbit.connect { uri = broker.uri { host = "127.0.0.1", port = port },
      reconnect = { initial = true, first = 0.01, attempts = 2 }, log = function() end }
    assert.is_nil(refused)
    assert.equal("refused", err.kind)
    local server
    moonrabbit.run(function()
      moonrabbit.spawn(function()
        moonrabbit.sleep(0.1)
        server = proxy.start(broker.parsed().host, broker.parsed().port, port)
      end)
      connect { uri = broker.uri { host = "127.0.0.1", port = port }, reconnect = { initial = true, first = 0.02 } }
    end)
    assert.is_true(conn:is_open())
    conn:close(5)
    server:stop()
  end)

  it("waits until it is open again", function()
    connect()
    assert.is_true(ok(conn:wait_open()))
    through.held = true
    through:cut()
    eventually(function() return (conn:state()) == "recovering" end)
    through.held = false
    assert.is_true(ok(conn:wait_open(10)))
    conn:close()
    local open, err = conn:wait_open()
    assert.is_nil(open)
    assert.equal("closed", err.kind)
  end)
end)
