-- A primary site behind a proxy that can be taken away, and another broker as the standby.
local moonrabbit = require "moonrabbit"
local management = require "moonrabbit.management"
local broker = require "support.broker"
local cluster = require "support.cluster"
local proxy = require "support.proxy"
local ok, unique = broker.ok, broker.unique
local queue = moonrabbit.queue

describe("a primary and a standby site", function()
  if cluster.none() then pending(cluster.none()) return end

  local second, line, port, events
  local primary_port = tonumber(cluster.urls[1]:match ":(%d+)/")

  setup(function() second = cluster.second() end)
  before_each(function()
    events = {}
    line = proxy.start("127.0.0.1", primary_port)
    port = line.port
  end)
  after_each(function()
    broker.close_all()
    line:stop()
  end)

  local function connect(sites)
    sites.primary = sites.primary or {}
    sites.standby = sites.standby or {}
    sites.primary.uri = ("amqp://guest:guest@127.0.0.1:%d/%%2f"):format(port)
    sites.standby.uri = second.url
    local conn = ok(moonrabbit.connect { sites = sites, reconnect = { first = 0.02, max = 0.1 }, timeout = 15,
      log = function(level, text) if level == "error" then io.stderr:write(text, "\n") end end })
    finally(function() conn:close(5) end)
    for _, event in ipairs { "site", "held", "released" } do
      conn:on(event, function(what) events[#events + 1] = event .. " " .. tostring(what) end)
    end
    return conn
  end

  local function at(conn, name)
    broker.eventually(function() return conn:site() == name and conn:state() == "open" end, 60, "it is at the " .. name)
  end

  it("fails over, holds publishing until it is released, and fails back", function()
    local fit = false
    local conn = connect {
      standby = { check = function(c)
        assert(c:channel()):close()
        return fit, "not checked yet"
      end },
      after = 0.3, hold = 0.3, probe = 0.1,
    }
    assert.same({ "primary", true }, { conn:site() })
    local ch = ok(conn:channel { confirm = true, prefetch = 10 })
    local name = unique "sites"
    ok(ch:queue_declare(name, queue.classic()))
    local consumer = ok(ch:consume(name))
    ok(ch:publish("at the primary", { routing_key = name }))
    ok(consumer:receive(10)):ack()

    line:stop()
    at(conn, "standby")
    assert.is_false((select(2, conn:site())))
    local sent, err = ch:publish("too early", { routing_key = name })
    assert.is_nil(sent)
    assert.equal("blocked", err.kind)
    assert.matches("consume%-only", err.message)
    assert.is_true(err.temporary)
    -- The queue was restored here, and is consumed from.
    local other = ok(broker.connect { uri = second.url }:channel { confirm = true })
    ok(other:publish("at the standby", { routing_key = name }))
    assert.equal("at the standby", ok(consumer:receive(20)).body)
    broker.eventually(function() return table.concat(events, ","):find "held not checked yet" end, 10)

    fit = true
    broker.eventually(function() return select(2, conn:site()) end, 20, "it is released")
    ok(ch:publish("released", { routing_key = name }))
    assert.equal("released", ok(consumer:receive(10)).body)

    line = proxy.start("127.0.0.1", primary_port, port)
    at(conn, "primary")
    broker.eventually(function() return (ch:publish("back", { routing_key = name, timeout = 2 })) end, 20)
    local body
    repeat body = ok(consumer:receive(20)).body until body == "back"
    broker.eventually(function() return events[#events] == "site primary" end, 5)
    assert.same({ "site standby", "held not checked yet", "released standby", "site primary" }, events)
    ok(ch:queue_delete(name))
    other:queue_delete(name)
  end)

  it("starts at the standby when the primary is not there", function()
    line:stop()
    local conn = connect { hold = math.huge }
    assert.same({ "standby", true }, { conn:site() })
  end)

  it("goes back to nodes that it has learned, where those that are listed stay away", function()
    line:stop()
    local conn = connect {
      primary = { mode = "smart", management = cluster.management, smart = { refresh = 0.2 } }, hold = 0.3, probe = 0.1,
    }
    assert.equal("standby", (conn:site()))
    at(conn, "primary")
    assert.truthy(cluster.node_of(conn))
  end)

  it("opens publishing by hand", function()
    line:stop()
    local conn = connect { standby = { check = function() return false end }, hold = math.huge }
    local ch = ok(conn:channel { confirm = true })
    local name = ok(ch:queue_declare("", { exclusive = true })).queue
    assert.is_nil((ch:publish("x", { routing_key = name })))
    local publisher = ok(conn:publisher { routing_key = name })
    local sent, err = publisher:send("x", { timeout = 0.2 })
    assert.is_nil(sent)
    assert.equal("blocked", err.kind)
    assert.matches("consume%-only", err.message)
    conn:release()
    ok(ch:publish("x", { routing_key = name }))
    ok(publisher:send "y")
  end)

  it("with wrong options throw, naming them", function()
    for pattern, opts in pairs {
      ["option 'uri' belongs into each"] = { uri = "amqp://", sites = { primary = {}, standby = {} } },
      ["sites.standby is missing"] = { sites = { primary = {} } },
      ["did you mean 'standby'"] = { sites = { primary = {}, standbi = {} } },
      ["sites.primary: unknown option 'heartbeat'"] = { sites = { primary = { heartbeat = 5 }, standby = {} } },
      ["sites.standby: invalid AMQP URI"] = { sites = { primary = {}, standby = { uri = "http://x" } } },
      ["sites.primary: option 'near' needs mode"] = { sites = { primary = { near = "q" }, standby = {} } },
    } do
      local done, err = pcall(function() moonrabbit.connect(opts) end)
      assert.is_false(done)
      assert.matches(pattern, err)
      assert.matches("sites_spec", err)
    end
    local conn = broker.connect { uri = cluster.urls[1] }
    assert.is_nil((conn:site()))
    assert.has_error(function() conn:release() end)
  end)

  it("have their definitions carried over and compared", function()
    local here, there = management.new(cluster.management[1]), management.new(second.management)
    local vhost = unique "definitions"
    for _, api in ipairs { here, there } do
      ok(api:set_vhost(vhost))
      ok(api:set_permissions(vhost, "guest"))
    end
    local ch = ok(broker.connect { uri = cluster.urls[1], vhost = vhost }:channel())
    ok(ch:queue_declare("carried", queue.quorum()))
    ok(here:set_policy(vhost, "limit", { pattern = "^c", definition = { ["max-length"] = 9 } }))
    local wanted, text = ok(here:definitions(vhost))
    assert.equal(2, #management.compare(wanted, (ok(there:definitions(vhost)))))
    ok(there:import_definitions(text, vhost))
    assert.same({}, management.compare(wanted, (ok(there:definitions(vhost)))))
    for _, api in ipairs { here, there } do ok(api:delete_vhost(vhost)) end
  end)
end)
