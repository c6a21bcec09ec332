-- The scripts on a machine that lacks something: they say what, and what to do, and exit with 1.
local process = require "support.process"

-- A folder of links to these programs only, as the whole PATH.
local function folder(programs)
  local path = os.tmpname()
  os.remove(path)
  assert(os.execute("mkdir " .. path))
  for _, name in ipairs(programs) do
    os.execute(("ln -s $(command -v %s) %s/%s"):format(name, path, name))
  end
  return path
end

local function run(words, env)
  local result = process.run(words, { raw = true, env = env, timeout = 20 })
  return result
end

describe("scripts/deps", function()
  local shell = { "sh", "sed", "tr", "id", "timeout" }

  it("lists what is missing where there is neither dpkg-query nor a compiler", function()
    local bin = folder(shell)
    local result = run({ "/bin/sh", "scripts/deps", "build", "broker" }, { PATH = bin })
    os.execute("rm -r " .. bin)
    assert.equal(1, result.code, result.err)
    assert.equal("", result.out)
    local missing = result.err:match "not found here:([^\n]*)"
    assert.truthy(missing, result.err)
    for _, what in ipairs { "cc", "make", "lua", "luajit", "rabbitmq%-c%-headers", "openssl%-headers" } do
      assert.matches(what, missing)
    end
    assert.matches("rabbitmq%-server", result.err)
    assert.matches("librabbitmq%-dev", result.err)
  end)

  it("says what to install where there is no apt-get", function()
    local bin = folder(shell)
    -- A dpkg-query that knows of one package.
    local file = assert(io.open(bin .. "/dpkg-query", "w"))
    file:write "#!/bin/sh\necho 'installed gcc'\nexit 1\n"
    file:close()
    os.execute("chmod 755 " .. bin .. "/dpkg-query")
    local result = run({ "/bin/sh", "scripts/deps", "build", "broker" }, { PATH = bin })
    os.execute("rm -r " .. bin)
    assert.equal(1, result.code, result.err)
    assert.equal("", result.out)
    assert.matches("no apt%-get", result.err)
    local missing = result.err:match "missing: ([^\n]*)"
    assert.matches("librabbitmq%-dev", missing)
    assert.matches("rabbitmq%-server", missing)
    assert.falsy((" " .. missing .. " "):find(" gcc ", 1, true))
    assert.matches("apt%-get update && .*apt%-get install", result.err)
    assert.matches("AMQP_URL=", result.err)
  end)

  it("tells nobody to use a sudo that is not there, or not needed", function()
    for _, case in ipairs {
      { id = 0, sudo = true, says = "run this, then try again:\n  apt%-get update && apt%-get install" },
      { id = 1000, sudo = true, says = "run this, then try again:\n  sudo apt%-get update && sudo apt%-get install" },
      { id = 1000, sudo = false, says = "who is root run this, then try again:\n  apt%-get update" },
    } do
      local bin = folder { "sh", "sed", "tr", "timeout" }
      local function program(name, text)
        local file = assert(io.open(bin .. "/" .. name, "w"))
        file:write("#!/bin/sh\n", text, "\n")
        file:close()
        os.execute("chmod 755 " .. bin .. "/" .. name)
      end
      program("dpkg-query", "exit 1")
      program("id", "echo " .. case.id)
      if case.sudo then program("sudo", "exit 1") end
      local result = run({ "/bin/sh", "scripts/deps", "demo" }, { PATH = bin })
      os.execute("rm -r " .. bin)
      assert.equal(1, result.code, result.err)
      assert.matches(case.says, (result.err:gsub("deps: ", "")))
    end
  end)

  it("knows its groups", function()
    local result = run { "/bin/sh", "scripts/deps", "nonsense" }
    assert.equal(2, result.code)
    assert.matches("no group 'nonsense'", result.err)
  end)
end)

describe("scripts/broker", function()
  -- Programs that are never started, for it does not get that far.
  local function installed()
    local bin = folder {}
    for _, name in ipairs { "rabbitmq-server", "rabbitmqctl", "rabbitmq-plugins" } do
      local file = assert(io.open(bin .. "/" .. name, "w"))
      file:write "#!/bin/sh\nexit 1\n"
      file:close()
      os.execute("chmod 755 " .. bin .. "/" .. name)
    end
    return bin
  end

  it("says what to do when there is no loopback, once", function()
    local none = run({ "unshare", "-n", "true" }, {})
    if none.code ~= 0 then pending "unshare -n is not allowed here" return end
    local root, bin = folder {}, installed()
    local result = run({ "unshare", "-n", "scripts/with-broker", "single", "--", "true" },
      { MOONRABBIT_BROKER_DIR = root, MOONRABBIT_RABBITMQ_BIN = bin, AMQP_URL = "" })
    local left = run({ "find", root, "-mindepth", "1", "-not", "-name", ".*.lock" }, {})
    os.execute("rm -r " .. root .. " " .. bin)
    assert.equal(1, result.code, result.err)
    assert.matches("^broker: 127.0.0.1 cannot be reached: bring the loopback interface up[^\n]*\n$", result.err)
    assert.equal("", left.out)
  end)

  it("forgets what never was", function()
    local root = folder {}
    local result = run({ "scripts/broker", "forget", "--name", "never" }, { MOONRABBIT_BROKER_DIR = root })
    os.execute("rm -r " .. root)
    assert.equal(0, result.code, result.err)
    assert.equal("", result.err)
  end)

  it("says what to do when a pinned port is taken", function()
    if not io.open "/proc/net/tcp" then pending "looks at /proc/net/tcp" return end
    local server = assert(require "moonrabbit.net".listen("127.0.0.1", 0))
    local root, bin = folder {}, installed()
    local port = server:port()
    local result = run({ "scripts/broker", "start", "single", "--name", "pinned" }, {
      MOONRABBIT_BROKER_DIR = root, MOONRABBIT_AMQP_PORT = tostring(port), MOONRABBIT_RABBITMQ_BIN = bin,
    })
    server:close()
    os.execute("rm -r " .. root .. " " .. bin)
    assert.equal(1, result.code, result.err)
    assert.matches(("port %d %%(MOONRABBIT_AMQP_PORT%%) is taken"):format(port), result.err)
    assert.matches("unset MOONRABBIT_AMQP_PORT", result.err)
    assert.falsy(result.err:find("unbound variable", 1, true), result.err)
  end)
end)
