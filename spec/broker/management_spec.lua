-- moonrabbit.management against a real broker. Queue kinds and clusters: spec/cluster.
local moonrabbit = require "moonrabbit"
local management = require "moonrabbit.management"
local broker = require "support.broker"
local ok, unique = broker.ok, broker.unique

local url = os.getenv "AMQP_MANAGEMENT_URL"

describe("the management API", function()
  if not url then pending "AMQP_MANAGEMENT_URL is not set: no broker with the management plugin" return end

  local api = management.new(url)
  local vhost = unique "vhost/ä b"

  setup(function()
    ok(api:set_vhost(vhost, { description = "of a spec" }))
    ok(api:set_permissions(vhost, "guest"))
  end)
  teardown(function() ok(api:delete_vhost(vhost)) end)
  after_each(broker.close_all)

  it("tells about the broker #smoke", function()
    local overview = ok(api:overview())
    assert.matches("^%d+%.%d+", overview.rabbitmq_version)
    local node = ok(api:nodes())[1]
    assert.is_true(node.running)
    assert.equal(node.name, ok(api:node(node.name)).name)
    assert.same("guest", ok(api:whoami()).name)
    assert.same({ "administrator" }, ok(api:whoami()).tags)
  end)

  it("passes and fails health checks", function()
    ok(api:health "alarms")
    ok(api:health("port-listener", broker.parsed().port))
    local passed, err = api:health("port-listener", 1)
    assert.is_nil(passed)
    assert.equal("http", err.kind)
    assert.equal(503, err.code)
    assert.matches("^health check port%-listener", err.message)
  end)

  it("shows queues, exchanges and bindings of a vhost with a difficult name", function()
    local ch = ok(broker.connect { vhost = vhost }:channel())
    ok(ch:exchange_declare("ex/1", { type = "topic" }))
    ok(ch:queue_declare("q ü?&1", { durable = true, arguments = { ["x-max-length"] = 5 } }))
    ok(ch:queue_bind("q ü?&1", "ex/1", "a.#"))
    assert.equal(5, ok(api:queue(vhost, "q ü?&1")).arguments["x-max-length"])
    assert.equal(1, #ok(api:queues { vhost = vhost, columns = { "name" } }))
    assert.equal("topic", ok(api:exchange(vhost, "ex/1")).type)
    assert.truthy(#ok(api:exchanges(vhost)) > 7)
    assert.equal("a.#", ok(api:bindings(vhost))[2].routing_key)
    assert.equal("ex/1", ok(api:queue_bindings(vhost, "q ü?&1"))[2].source)
    local where = ok(api:leader(vhost, "q ü?&1"))
    assert.equal("classic", where.type)
    assert.equal(ok(api:overview()).node, where.leader)
    ok(api:delete_queue(vhost, "q ü?&1"))
    local gone, err = api:queue(vhost, "q ü?&1")
    assert.is_nil(gone)
    assert.equal(404, err.code)
  end)

  it("sets, shows and deletes policies", function()
    ok(api:set_policy(vhost, "limit/1", { pattern = "^l", definition = { ["max-length"] = 3 }, priority = 7,
      apply_to = "queues" }))
    local policy = ok(api:policy(vhost, "limit/1"))
    assert.equal(3, policy.definition["max-length"])
    assert.equal(7, policy.priority)
    assert.equal(1, #ok(api:policies(vhost)))
    ok(api:delete_policy(vhost, "limit/1"))
    assert.equal(0, #ok(api:policies(vhost)))
    local set, err = api:set_policy(vhost, "bad", { pattern = "*", definition = { ["max-length"] = 3 } })
    assert.is_nil(set)
    assert.equal(400, err.code)
    assert.matches("Validation failed", err.message)
  end)

  it("makes users, and says what they may do and what they may not ask", function()
    local name = unique "user"
    ok(api:set_user(name, { password = "hunter22" }))
    ok(api:set_permissions(vhost, name, { configure = "", read = "^r" }))
    local permissions = ok(api:permissions(vhost, name))
    assert.same({ "", ".*", "^r" }, { permissions.configure, permissions.write, permissions.read })
    local none, err = api:permissions("/", name)
    assert.is_nil(none)
    assert.equal(404, err.code)

    local theirs = management.new { uri = url, user = name, password = "hunter22" }
    local _, forbidden = theirs:nodes()
    assert.equal("auth", forbidden.kind)
    ok(api:set_user(name, { password = "hunter22", tags = "monitoring" }))
    assert.same({ "monitoring" }, ok(theirs:whoami()).tags)
    assert.equal(1, #ok(theirs:nodes()))
    local _, not_theirs = theirs:set_user("x", {})
    assert.equal("auth", not_theirs.kind)
    assert.not_matches("hunter22", tostring(not_theirs))

    ok(api:delete_user(name))
    local _, unknown = theirs:whoami()
    assert.equal(401, unknown.code)
  end)

  it("closes a connection, which hears why", function()
    local name = unique "doomed"
    local conn = broker.connect { name = name }
    local closed
    conn:on("state", function(_, err) closed = closed or err end)
    local found = broker.eventually(function()
      assert.equal("table", type(ok(api:connections "/")))
      for _, each in ipairs(ok(api:connections())) do
        if each.client_properties and each.client_properties.connection_name == name then return each.name end
      end
      moonrabbit.sleep(0.2)
    end, 30, "the connection is listed")
    ok(api:close_connection(found, "spring cleaning"))
    broker.eventually(function() return closed end, 10, "closed")
    assert.equal(320, closed.code)
    assert.matches("spring cleaning", closed.message)
  end)

  it("exports definitions, imports them elsewhere and compares", function()
    local ch = ok(broker.connect { vhost = vhost }:channel())
    ok(ch:queue_declare("kept", { durable = true, arguments = { ["x-max-length"] = 5 } }))
    ok(ch:exchange_declare("kept", { durable = true }))
    ok(ch:queue_bind("kept", "kept", "k"))
    local wanted, text = ok(api:definitions(vhost))
    local other = unique "standby"
    ok(api:set_vhost(other))
    finally(function() api:delete_vhost(other) end)
    local before = ok(api:definitions(other))
    assert.truthy(#management.compare(wanted, before) >= 3)
    ok(api:import_definitions(text, other))
    local there = ok(api:definitions(other))
    assert.same({}, management.compare(wanted, there))
    local whole = ok(api:definitions())
    assert.truthy(#whole.users > 0)
  end)

  it("says nothing of definitions that contradict what is there: comparing does", function()
    local ch = ok(broker.connect { vhost = vhost }:channel())
    ok(ch:exchange_declare("clash", { durable = true, type = "fanout" }))
    local text = [[{"exchanges":[{"name":"clash","type":"topic","durable":true,"auto_delete":false,"internal":false,
      "arguments":{}}]}]]
    ok(api:import_definitions(text, vhost))
    local found = {}
    for _, each in ipairs(management.compare(require("cjson").decode(text), ok(api:definitions(vhost)))) do
      if each.status ~= "extra" then found[#found + 1] = each end
    end
    assert.same({ { section = "exchanges", name = "clash", status = "different", fields = { "type" } } }, found)
  end)

  it("refuses definitions that are wrong, with the reason", function()
    local imported, err = api:import_definitions(
      '{"policies":[{"name":"bad","pattern":"*","definition":{"max-length":1},"priority":0,"apply-to":"all"}]}', vhost)
    assert.is_nil(imported)
    assert.equal("http", err.kind)
    assert.equal(400, err.code)
  end)

  it("is told apart from a port that speaks AMQP", function()
    local p = broker.parsed()
    local _, err = management.new(("http://%s:%d"):format(p.host, p.port)):nodes()
    assert.equal("protocol", err.kind)
  end)
end)
