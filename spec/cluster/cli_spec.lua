-- The commands that look at a cluster, on one of three nodes of which one dies.
local moonrabbit = require "moonrabbit"
local management = require "moonrabbit.management"
local broker = require "support.broker"
local cluster = require "support.cluster"
local process = require "support.process"
local ok, unique = broker.ok, broker.unique

describe("the command line on a cluster", function()
  if cluster.none() then pending(cluster.none()) return end

  local api = management.new(cluster.management[1])
  after_each(broker.close_all)

  local function run(words, env)
    local all = { AMQP_URL = cluster.urls[1], MOONRABBIT_MANAGEMENT_URL = cluster.management[1] }
    for name, value in pairs(env or {}) do all[name] = value end
    return process.run({ "bin/moonrabbit", (table.unpack or unpack)(words) }, { env = all }) -- luacheck: ignore
  end

  -- Its lines about nodes, "✓ 1" or "✗ 3", sorted.
  local function nodes_in(text)
    local list = {}
    for line in text:gmatch "[^\n]+" do
      local mark, node = line:match("^(%S+) node%s.-" .. broker.name .. "%-(%d)@")
      if mark then list[#list + 1] = mark .. " " .. node end
    end
    table.sort(list)
    return list
  end

  it("shows the nodes and the leaders, looks at each node, and says which is down", function()
    local ch = ok(broker.connect { uri = cluster.urls[1] }:channel())
    local queue = unique "seen"
    ok(ch:queue_declare(queue, moonrabbit.queue.quorum()))
    finally(function() api:delete_queue("/", queue) end)
    local status, doctor
    broker.eventually(function() -- the API's figures are some seconds old
      status = run { "cluster", "status" }
      return status.code == 0
    end, 60, "all is well")
    assert.same({ "✓ 1", "✓ 2", "✓ 3" }, nodes_in(status.out))
    assert.matches("leaders: .*%d at " .. broker.name:gsub("%p", "%%%0"), status.out)
    doctor = run { "doctor", "--cluster", "--rounds", "1" }
    assert.equal(0, doctor.code, doctor.out .. doctor.err)
    assert.matches("✓ cluster +3 nodes", doctor.out)
    assert.same({ "✓ 1", "✓ 2", "✓ 3" }, nodes_in(doctor.out))

    cluster.node("kill", 3)
    broker.eventually(function()
      status = run { "cluster", "status" }
      return status.out:find("2 of 3 members", 1, true) and status.out:find "%-3@%S+: down"
    end, 60, "one is down")
    assert.equal(1, status.code)
    assert.same({ "✓ 1", "✓ 2", "✗ 3" }, nodes_in(status.out))
    doctor = run { "doctor", "--cluster", "--rounds", "1" }
    assert.equal(1, doctor.code)
    assert.same({ "✓ 1", "✓ 2", "✗ 3" }, nodes_in(doctor.out))
    assert.matches("is down\n.*forget_cluster_node", doctor.out)

    cluster.node("restart", 3)
    broker.eventually(function() return run({ "cluster", "status" }).code == 0 end, 120, "it is back")
  end)

  it("says when the management API does not tell of the nodes", function()
    local doctor = run({ "doctor", "--cluster", "--rounds", "1" }, { MOONRABBIT_MANAGEMENT_URL = "http://127.0.0.1:1" })
    assert.equal(3, doctor.code)
    assert.matches("✗ cluster .*refused.*\n +→ is the plugin enabled", doctor.out)
    local user = unique "limited"
    ok(api:set_user(user, { password = "hunter22", tags = "management" }))
    ok(api:set_permissions("/", user))
    doctor = run({ "doctor", "--cluster", "--rounds", "1" },
      { AMQP_URL = cluster.uri(1, user .. ":hunter22"),
        MOONRABBIT_MANAGEMENT_URL = (cluster.management[1]:gsub("//.-@", "//")) })
    assert.equal(4, doctor.code, doctor.out)
    assert.matches("✗ cluster .*\n +→ the user needs the tag 'monitoring'", doctor.out)
    assert.not_matches("hunter22", doctor.out .. doctor.err)
    ok(api:delete_user(user))
  end)
end)
